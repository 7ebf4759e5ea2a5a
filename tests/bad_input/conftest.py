"""Commands run as a person runs them: words in; exit code, output and complaint out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bad_input.saying import Said


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`say(main, "join", …)` runs a program's `main` in this process."""

    def run(main: Callable[[], object], *words: object) -> Said:
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
            raise SystemExit(0)
        code = ended.value.code
        shown = capsys.readouterr()
        return Said(code if isinstance(code, int) else 0, shown.out, shown.err)

    return run
