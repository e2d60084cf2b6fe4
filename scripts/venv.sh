# Sourced by the other scripts: one function that makes a virtual environment.

# make_venv FOLDER "PIP ARGUMENTS": make it once, and again when what it holds changed.
make_venv() {
    local folder=$1 wanted=$2 python stamp words
    read -ra words <<<"$wanted" # not $wanted, which would be taken for patterns
    stamp=$(cat pyproject.toml constraints.txt <(echo "$wanted") | cksum)
    if [ -f "$folder/stamp" ] && [ "$(cat "$folder/stamp")" = "$stamp" ]; then
        return
    fi
    for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            break
        fi
        python=""
    done
    if [ -z "$python" ]; then
        echo "no Python 3.10 or newer found; set PYTHON to one" >&2
        exit 1
    fi
    echo "making $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --upgrade "pip>=25.1"
    # torch first and alone, so that nothing else chooses its version
    "$folder/bin/pip" install --quiet torch -c constraints.txt
    "$folder/bin/pip" install --quiet -c constraints.txt "${words[@]}"
    echo "$stamp" >"$folder/stamp"
}
