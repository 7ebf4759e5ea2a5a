#!/bin/sh
# Takes the containerised Paris node off this computer again.
#
#   uninstall.sh --keep-identity   removes container and image; the volume with the key stays
#   uninstall.sh --purge           removes the volume too
#   uninstall.sh … --dry-run       only says what it would do

set -eu

main() {
    keep='' purge='' dry=''
    while [ $# -gt 0 ]; do
        case $1 in
            --keep-identity) keep=yes ;;
            --purge) purge=yes ;;
            --dry-run) dry=yes ;;
            *) printf 'usage: uninstall.sh --keep-identity | --purge [--dry-run]\n' >&2; exit 2 ;;
        esac
        shift
    done
    if [ "$keep$purge" != yes ]; then
        printf 'Say --keep-identity or --purge: the volume paris_paris-state holds the only copy of the key.\n' >&2
        exit 2
    fi
    cd "$(dirname "$0")"
    set -- docker compose -f compose.yaml down --rmi all
    if [ -n "$purge" ]; then set -- "$@" --volumes; fi
    printf '  %s\n' "$*"
    [ -n "$dry" ] || "$@"
}

main "$@"
