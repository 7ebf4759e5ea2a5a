#!/bin/sh
# Installs a Paris node for the current user, on Linux and macOS, from one wheel.
#
#   installers/install.sh --wheel paris_ddm-0.1.0-py3-none-any.whl [--sha256 HEX] [--dry-run] [--no-service]
#   installers/install.sh --wheel https://…/paris_ddm-0.1.0-py3-none-any.whl --sha256 HEX
#
# It writes, and prints before it writes:
#   ~/.local/share/paris/app/<digest>/   a private virtual environment, nothing shared with other programs
#   ~/.local/share/paris/uninstall.sh    the way back
#   ~/.local/bin/paris-node, paris       links into that environment
#   ~/.config/systemd/user/paris-node.service      (Linux; started only when you say so)
#   ~/Library/LaunchAgents/org.paris-ddm.node.plist (macOS)
# It never touches drivers, groups, firewall, shell start-up files or anything outside your home, and needs no root.
# Running it again upgrades or repairs; a failed run leaves the old installation as it was.
#
# Environment: PARIS_WHEEL, PARIS_WHEEL_SHA256 (as the options); PARIS_PYTHON (a Python >= 3.11); PARIS_TORCH_INDEX
# (another PyTorch index, such as https://download.pytorch.org/whl/cpu); PARIS_PIP_ARGS (further words for pip, split at
# spaces); PARIS_EXTRAS (default "node"; empty: the light core alone, enough for `paris verify`).
# Exit codes: 0 done, 2 usage, 20 wheel refused, 24 something else stands where a file must go, 40 download failed,
# 50 pip failed.

set -eu
umask 077

say() { printf '%s\n' "$*"; }
fail() { code=$1; shift; printf 'install.sh: %s\n' "$*" >&2; exit "$code"; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

find_python() {
    for python in "${PARIS_PYTHON:-}" python3.12 python3.11 python3; do
        if [ -z "$python" ] || ! command -v "$python" >/dev/null 2>&1; then continue; fi
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$python"
            return 0
        fi
    done
    fail 2 "no Python 3.11 or newer with venv was found. Install it (Debian: apt install python3-venv) or set PARIS_PYTHON."
}

sha256() { # FILE
    if command -v sha256sum >/dev/null 2>&1; then sha256sum "$1" | cut -d' ' -f1; else shasum -a 256 "$1" | cut -d' ' -f1; fi
}

fetch() { # URL FILE
    case $1 in https://*) ;; *) fail 2 "$1: only https addresses are fetched." ;; esac
    say "  download  $1"
    if command -v curl >/dev/null 2>&1; then
        curl --proto '=https' --tlsv1.2 -fsSL -o "$2" "$1" || fail 40 "the download of $1 failed."
    else
        wget -q --https-only -O "$2" "$1" || fail 40 "the download of $1 failed."
    fi
}

get_wheel() { # sets $file: the wheel on this disk, with the digest that was asked for
    case $wheel in
        *://*)
            [ -n "$digest" ] || fail 2 "a wheel from an address needs --sha256."
            file=$work/${wheel##*/}
            fetch "$wheel" "$file" ;;
        *)
            [ -f "$wheel" ] || fail 20 "$wheel: there is no such file."
            file=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel") ;;
    esac
    found=$(sha256 "$file")
    if [ -n "$digest" ] && [ "$found" != "$digest" ]; then
        fail 20 "the wheel has the SHA-256 $found, not $digest: it is not what was announced. Nothing was installed."
    fi
}

ours() { # LINK: may it be replaced? yes when it is absent or one of our own links
    [ ! -e "$1" ] && [ ! -L "$1" ] && return 0
    [ -L "$1" ] && case $(readlink "$1") in "$data"/app/*) return 0 ;; esac
    return 1
}

check_places() {
    for program in $programs; do
        ours "$bin/$program" || fail 24 "$bin/$program exists and is not from this installer. Move it away and run this again."
    done
}

plan() {
    say "Paris node, wheel ${wheel##*/}"
    [ -z "$file" ] || say "  sha256    $found"
    say "  python    $python ($("$python" -c 'import platform; print(platform.python_version())'))"
    say "This writes:"
    say "  $app/  (virtual environment; with PyTorch from the default index about 6 GB on Linux, 1 GB on macOS)"
    say "  $data/uninstall.sh"
    for program in $programs; do say "  $bin/$program"; done
    [ -z "$service" ] || say "  $service"
    say "and nothing else. No driver, group, firewall rule or start-up file is touched."
}

make_environment() {
    if [ -e "$app" ]; then # left by a broken run, or the same wheel again: make it anew
        rm -rf "$app.old"
        mv "$app" "$app.old"
    fi
    mkdir -p "$data/app"
    making=yes
    "$python" -m venv "$app" || fail 50 "no virtual environment could be made."
    # shellcheck disable=SC2086  # the words of PARIS_PIP_ARGS are meant to be split
    "$app/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check \
        ${PARIS_TORCH_INDEX:+--extra-index-url "$PARIS_TORCH_INDEX"} ${PARIS_PIP_ARGS:-} \
        "$file${extras:+[$extras]}" || fail 50 "pip could not install the wheel; its message stands above."
    "$app/bin/paris" --help >/dev/null || fail 50 "the installed program does not start."
    making=''
    rm -rf "$app.old"
}

undo() { # a failed run takes back its half-made environment and puts the old one back
    status=$?
    if [ -n "$making" ]; then
        rm -rf "$app"
        if [ -e "$app.old" ]; then mv "$app.old" "$app"; fi
        rmdir "$data/app" "$data" 2>/dev/null || true
    fi
    rm -rf "$work"
    exit "$status"
}

write_links() {
    mkdir -p "$bin"
    for program in $programs; do
        [ -x "$app/bin/$program" ] || continue
        say "  write $bin/$program"
        ln -sfn "$app/bin/$program" "$bin/$program"
    done
    say "  write $data/uninstall.sh"
    cp "$here/uninstall.sh" "$data/uninstall.sh"
    chmod 700 "$data/uninstall.sh"
    for old in "$data"/app/*; do # an upgrade leaves one environment
        if [ "$old" != "$app" ]; then rm -rf "$old"; fi
    done
}

write_service() {
    [ -n "$service" ] || return 0
    say "  write $service"
    mkdir -p "$(dirname "$service")"
    cp "$template" "$service"
    chmod 644 "$service"
    if [ "$system" = Linux ] && command -v systemctl >/dev/null 2>&1; then
        systemctl --user daemon-reload >/dev/null 2>&1 || true # no session bus: read at the next login
    fi
}

farewell() {
    say
    say "Installed. Next:"
    case ":$PATH:" in *":$bin:"*) ;; *) say "  export PATH=\"$bin:\$PATH\"          # it is not on your PATH; this script changes no start-up file" ;; esac
    say "  paris-node doctor                            # look at this machine"
    say "  paris-node join paris://HOST/ID --dry-run    # what joining would do"
    say "  paris-node join paris://HOST/ID              # join and train in the foreground"
    if [ -n "$service" ]; then
        if [ "$system" = Darwin ]; then
            say "  launchctl load -w $service    # from then on at every login"
        else
            say "  systemctl --user enable --now paris-node     # from then on at every login"
        fi
    fi
    say "To undo all of it: $data/uninstall.sh"
}

main() {
    wheel=${PARIS_WHEEL:-} digest=${PARIS_WHEEL_SHA256:-} extras=${PARIS_EXTRAS-node} dry='' with_service=yes
    while [ $# -gt 0 ]; do
        case $1 in
            --wheel) [ $# -ge 2 ] || fail 2 "--wheel needs a path or an address."; wheel=$2; shift ;;
            --sha256) [ $# -ge 2 ] || fail 2 "--sha256 needs a digest."; digest=$2; shift ;;
            --dry-run) dry=yes ;;
            --no-service) with_service='' ;;
            -h | --help) usage; exit 0 ;;
            *) fail 2 "unknown option $1; see --help." ;;
        esac
        shift
    done
    [ -n "${HOME:-}" ] && [ -d "$HOME" ] || fail 2 "HOME is not a folder."
    [ -n "$wheel" ] || fail 2 "name the wheel: --wheel PATH or --wheel https://… --sha256 HEX."
    here=$(cd "$(dirname "$0")" && pwd)
    [ -f "$here/uninstall.sh" ] || fail 2 "run this file from its folder: uninstall.sh must stand beside it."

    system=$(uname -s) data=$HOME/.local/share/paris bin=$HOME/.local/bin programs="paris-node paris" service=''
    if [ "$system" = Darwin ]; then
        template=$here/macos/org.paris-ddm.node.plist target=$HOME/Library/LaunchAgents/org.paris-ddm.node.plist
    else
        template=$here/linux/paris-node.user.service target=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/paris-node.service
    fi
    if [ -n "$with_service" ]; then service=$target; fi
    python=$(find_python)
    file='' found='' making='' work=$(mktemp -d)
    trap undo EXIT
    trap 'exit 130' INT TERM

    case "$dry$wheel" in yes*://*) ;; *) get_wheel ;; esac # a dry run downloads nothing
    app=$data/app/$(printf '%.12s' "${found:-DIGEST}")
    check_places
    plan
    if [ -n "$dry" ]; then say "Dry run: nothing was written."; exit 0; fi
    say "Working:"
    say "  write $app/"
    make_environment
    write_links
    write_service
    farewell
}

main "$@"
