# A test fixture: `sudo` on a node: nobody there is anybody else, and this machine's own sudo is not asked.
while case "$1" in -*) true ;; *) false ;; esac; do shift; done
exec "$@"
