# A test fixture: `shutdown` of a node, never of this machine. What comes of it is its vendor's business.
case " $* " in
*" now "*) : >"${0%/*}/../off" ;;
*) echo "shutdown: only now" >&2; exit 1 ;;
esac
