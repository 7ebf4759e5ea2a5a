#!/bin/sh
# Takes a Paris node off this computer again (Linux and macOS, what install.sh wrote for this user).
#
#   uninstall.sh                   lists what it will delete and asks about the identity
#   uninstall.sh --keep-identity   keeps the node's key, its network and its journal of receipts; asks nothing
#   uninstall.sh --purge           deletes these too; asks nothing
#   uninstall.sh … --dry-run       only prints the table
#
# The identity is what proves that contributions were yours; there is no second copy of it anywhere. State folders that
# were given with --state are yours and are left alone. Exit codes: 0 done, 2 usage or nobody there to be asked.

set -eu

say() { printf '%s\n' "$*"; }
fail() { code=$1; shift; printf 'uninstall.sh: %s\n' "$*" >&2; exit "$code"; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# What of a state folder is the identity: the key, the network it joined, the settings and the receipts.
identity="key genesis.json node.toml journal.sqlite journal.sqlite-wal journal.sqlite-shm"

ask() { # sets $keep
    [ -e "$state/key" ] || { keep=; return 0; }
    [ -t 0 ] || fail 2 "say --keep-identity or --purge: nobody is there to be asked."
    printf 'Keep the identity key and the receipts in %s? [Y/n] ' "$state"
    read -r answer || answer=
    case $answer in n | N | no | No) keep= ;; *) keep=yes ;; esac
}

table() {
    say "This deletes:"
    for path in "$data/app" "$data/uninstall.sh" "$service"; do
        if [ -e "$path" ]; then say "  remove  $path"; fi
    done
    for program in $programs; do
        if ours "$bin/$program"; then say "  remove  $bin/$program"; fi
    done
    if [ -e "$state" ]; then
        if [ -n "$keep" ]; then
            say "  remove  $state (cache, unfinished work, logs)"
            for name in $identity; do
                if [ -e "$state/$name" ]; then say "  KEEP    $state/$name"; fi
            done
        else
            say "  remove  $state with the identity key and the receipts"
        fi
    fi
    say "  leave   everything else; nothing else was ever installed"
}

ours() { [ -L "$1" ] && case $(readlink "$1") in "$data"/app/*) return 0 ;; esac; return 1; }

stop_node() {
    if [ "$(uname -s)" = Darwin ]; then
        if [ -e "$service" ]; then launchctl unload -w "$service" >/dev/null 2>&1 || true; fi
    elif command -v systemctl >/dev/null 2>&1; then
        systemctl --user disable --now paris-node.service >/dev/null 2>&1 || true
    fi
    # A node in the foreground saves its work and ends; one that does not run is no error.
    if [ -e "$state" ] && [ -x "$bin/paris-node" ]; then "$bin/paris-node" stop --state "$state" >/dev/null 2>&1 || true; fi
}

remove_state() {
    [ -d "$state" ] || return 0
    if [ -z "$keep" ]; then rm -rf "$state"; return 0; fi
    for path in "$state"/* "$state"/.[!.]*; do
        case " $identity " in *" ${path##*/} "*) ;; *) rm -rf "$path" ;; esac
    done
}

remove_empty() { # FOLDER…: only what is empty goes
    for folder; do rmdir "$folder" 2>/dev/null || true; done
}

main() {
    keep=ask dry=''
    while [ $# -gt 0 ]; do
        case $1 in
            --keep-identity) keep=yes ;;
            --purge) keep='' ;;
            --dry-run) dry=yes ;;
            -h | --help) usage; exit 0 ;;
            *) fail 2 "unknown option $1; see --help." ;;
        esac
        shift
    done
    [ -n "${HOME:-}" ] && [ -d "$HOME" ] || fail 2 "HOME is not a folder."
    data=$HOME/.local/share/paris bin=$HOME/.local/bin programs="paris-node paris"
    state=$data/node config=${XDG_CONFIG_HOME:-$HOME/.config}
    if [ "$(uname -s)" = Darwin ]; then service=$HOME/Library/LaunchAgents/org.paris-ddm.node.plist
    else service=$config/systemd/user/paris-node.service; fi

    if [ "$keep" = ask ]; then ask; fi
    table
    if [ -n "$dry" ]; then say "Dry run: nothing was deleted."; exit 0; fi
    stop_node
    remove_state
    for program in $programs; do
        if ours "$bin/$program"; then rm -f "$bin/$program"; fi
    done
    rm -f "$service"
    rm -rf "$data/app"
    rm -f "$data/uninstall.sh"
    remove_empty "$state" "$data" "$bin" "$config/systemd/user" "$config/systemd" "$config" "$HOME/.local/share" "$HOME/.local"
    say "Done."
}

main "$@"
