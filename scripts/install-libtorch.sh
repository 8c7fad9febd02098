#!/bin/sh
# Installs libtorch 2.9 for the `tch` backend, as part of PyTorch, into a Python virtual environment.
#
#   scripts/install-libtorch.sh [DIRECTORY]     default: ~/.cache/ps/libtorch-venv
#
# Prints the variables to set on standard output and everything else on standard error, so that
#
#   eval "$(scripts/install-libtorch.sh)"
#   cargo test -p ps-model --features tch
#
# installs (once), sets and builds. Needs python3 with venv and pip, and the network the first time.
set -eu

# The version that the tch crate, 0.22, is made for. It refuses others.
version=2.9.0
directory=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/ps/libtorch-venv}

say() {
    echo "$@" >&2
}

fail() {
    say "error: $*"
    exit 1
}

case $(uname -s) in
Linux) library_path=LD_LIBRARY_PATH ;;
Darwin) library_path=DYLD_LIBRARY_PATH ;;
*) fail "this script knows Linux and macOS only; on Windows set LIBTORCH to libtorch $version" ;;
esac
command -v python3 >/dev/null || fail "python3 is not installed"

installed() {
    [ -x "$directory/bin/python" ] &&
        "$directory/bin/python" -m pip show torch 2>/dev/null | grep -q "^Version: $version"
}

if ! installed; then
    say "installing PyTorch $version into $directory"
    say "(on Linux PyPI has it with CUDA only: 3 GB to download, 7 GB on disk; delete the"
    say "directory to be rid of it)"
    python3 -m venv "$directory" >&2 ||
        fail "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$directory/bin/python" -m pip install --quiet --retries 10 --timeout 60 "torch==$version" >&2 ||
        fail "pip could not install torch==$version, for which Python 3.10 to 3.14 is needed"
    installed || fail "pip did not install torch $version"
fi

# Not by importing it, which takes seconds and warns about NumPy.
torch=$("$directory/bin/python" -c \
    'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')
[ -d "$torch/lib" ] && [ -d "$torch/include" ] || fail "no lib and include in $torch"

# A path with a quote in it would break out of the quotes below.
case $torch in
*\'*) fail "cannot print a path with a quote in it: $torch" ;;
esac

# LIBTORCH for the build; the library path to run, because cargo does not write it into binaries.
echo "export LIBTORCH='$torch'"
echo "export $library_path='$torch/lib'\"\${$library_path:+:\$$library_path}\""
