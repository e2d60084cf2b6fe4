#!/usr/bin/env bash
# Install what ComfyUI imports into the environment of the Python that is named.
# torch must be there already; whatever wants another torch goes in without its needs.
set -euo pipefail
python=$1
if [[ $python == */* ]]; then # still found from the folder that we go to
    python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
fi
cd "$(dirname "$0")/.."
stamp_file=$("$python" -c 'import sys; print(sys.prefix)')/comfyui-stamp
stamp=$(cat scripts/install-comfyui-deps.sh tests/comfyui/requirements.txt constraints.txt | cksum)
if [ -f "$stamp_file" ] && [ "$(cat "$stamp_file")" = "$stamp" ]; then
    exit 0
fi
pip=("$python" -m pip install --quiet -c constraints.txt)
"${pip[@]}" -r tests/comfyui/requirements.txt
"${pip[@]}" --no-deps torchvision torchaudio torchsde trampoline kornia kornia_rs spandrel
# torchaudio's compiled parts belong to another build of torch; ComfyUI needs none of them
rm -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/torchaudio/lib/*.so
echo "$stamp" >"$stamp_file"
