"""The command lines of the guides. The tests type them as they stand there, so a guide cannot say something else than
what was tried."""

import re
import shlex

from hosts import PROFILE, REPOSITORY, TARGET, example


def commands(guide):
    """All command lines in the shell blocks of a guide, without comments, with continuation lines joined."""
    text = (REPOSITORY / guide).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in map(without_comment, lines) if line.strip()]


def without_comment(line):
    return re.sub(r"(^|\s)#.*", "", line)


def command(guide, beginning):
    """The one command line of a guide that is or begins so."""
    if beginning in commands(guide):
        return beginning
    found = [line for line in commands(guide) if line.startswith(beginning)]
    if len(found) != 1:
        raise AssertionError(f"{guide} has {len(found)} commands that begin with {beginning!r}; has it been changed?")
    return found[0]


def words(line):
    return shlex.split(line)


# What `cargo run` and `cargo build` of the guides do, with what the test has built already: no release build, which
# would take minutes.
CARGO = f"""#!/bin/sh
command=$1
shift
while [ $# -gt 0 ]; do
    case $1 in
    --release) ;;
    --features) shift ;;
    --example) name=$2; shift ;;
    --) shift; break ;;
    *) echo "the test's cargo does not know $1" >&2; exit 2 ;;
    esac
    shift
done
case $command in
run) exec {TARGET}/{PROFILE}/examples/$name "$@" ;;
build) mkdir -p target/release/examples && strip -o target/release/examples/$name {TARGET}/{PROFILE}/examples/$name ;;
*) exit 2 ;;
esac
"""


def desk(folder, program="sharded_ps"):
    """Makes a folder look as a guide expects it: the program, the folder `deploy`, and a directory `bin` for `PATH` with
    the program and `cargo`. Returns that directory."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for place in (folder, binaries):
        (place / program).symlink_to(example(program))
    (folder / "deploy").symlink_to(REPOSITORY / "deploy")
    cargo = binaries / "cargo"
    cargo.write_text(CARGO)
    cargo.chmod(0o755)
    return binaries
