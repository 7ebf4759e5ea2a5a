"""A coordinator with instant jobs and three nodes in one process, for tests that kill it.

`python kill_target.py STATE` goes on with whatever is in STATE until the network is released. Every
answer that a node got is written to STATE/answers: what was promised must be there afterwards.
"""

import asyncio
import sys
from pathlib import Path

from coordinator.fakes import FakeNode, new_shift, open_office, run_out
from paris_coordinator.config import State


def main(folder):
    state = State(Path(folder))
    with state.lock(), (state.folder / "answers").open("a") as answers:

        class Telling(FakeNode):
            async def hand_in(self, office, answer, value=None):
                id = await super().hand_in(office, answer, value)
                answers.write(f"{id}\n")
                answers.flush()
                return id

        async def life():
            office = open_office(state)
            await office.project()
            await office.resume_uploads()
            answers.write("started\n")
            answers.flush()
            keeping = asyncio.create_task(keep(office))
            await run_out(
                office, new_shift(office), [Telling(office.network, s + 1) for s in range(3)]
            )
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await office.project()

        asyncio.run(life())


async def keep(office):
    while True:
        await office.project()
        await asyncio.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1])
