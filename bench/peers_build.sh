#!/bin/sh
# Installs what bench/peers.py compares with (as root on Debian or Ubuntu by apt-get, and by npm) and builds the programs to
# build/peers. What cannot be had is left out with a line that says so. `make bench-peers` runs it.
#
# ggml is built from its sources by the user (see bench/peers_ggml.c); GGML names their folder.
# PEER_PYTHON: the python3 that has torch and onnx (default /usr/bin/python3, which Debian's packages belong to).
cd "$(dirname "$0")/.." || exit 1
out=build/peers
cc=${CC:-cc}
python=${PEER_PYTHON:-/usr/bin/python3}
arch=$(gcc -print-multiarch 2>/dev/null)
mkdir -p $out

apt() {  # apt PACKAGE...: those that are missing
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return
    missing=
    for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"; done
    [ -z "$missing" ] && return
    echo "installing$missing"
    [ -n "$updated" ] || { apt-get update >/dev/null 2>&1; updated=1; }
    for package in $missing; do
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" >/dev/null 2>&1 ||
            echo "  $package cannot be installed"
    done
}

build() {  # build NAME SOURCE FLAGS...
    name=$1 source=$2
    shift 2
    $cc -O2 -Wall -Wextra -Ibench "$source" -o $out/$name "$@" 2>$out/$name.log && return
    echo "$name cannot be built: left out (see $out/$name.log)"
    rm -f $out/$name
}

apt libopenblas-dev libblis-dev libdnnl-dev libxsmm-dev python3-torch python3-onnx gnuplot-nox

build openblas bench/peers_blas.c -DPEER_NAME='"openblas"' -isystem "/usr/include/$arch/openblas-pthread" \
    -L"/usr/lib/$arch/openblas-pthread" -lopenblas
build blis bench/peers_blas.c -DPEER_NAME='"blis"' -isystem "/usr/include/$arch/blis-openmp" -L"/usr/lib/$arch/blis-openmp" \
    -lblis -lm -lpthread
build onednn bench/peers_onednn.c -ldnnl
build libxsmm bench/peers_libxsmm.c -lxsmm -lblas -lm -ldl -lpthread
if [ -n "$GGML" ]; then
    lib=$GGML/build/src
    build ggml bench/peers_ggml.c -isystem "$GGML/include" "$lib/libggml.a" "$lib/libggml-cpu.a" "$lib/libggml-base.a" \
        -lstdc++ -lm -lpthread -ldl
else
    [ -e $out/ggml ] || echo 'ggml: GGML does not name its folder, left out'
fi

rm -f $out/torch $out/onnxruntime
if "$python" -c 'import torch' 2>/dev/null; then touch $out/torch; else echo "torch: $python has none, left out"; fi
if command -v npm >/dev/null && "$python" -c 'import onnx' 2>/dev/null; then
    [ -d $out/node_modules/onnxruntime-node ] ||
        npm install --ignore-scripts --no-audit --no-fund --prefix $out onnxruntime-node >$out/onnxruntime.log 2>&1
    if [ -d $out/node_modules/onnxruntime-node ]; then touch $out/onnxruntime
    else echo "onnxruntime-node cannot be installed: left out (see $out/onnxruntime.log)"; fi
else
    echo "onnxruntime: needs npm, and onnx for $python: left out"
fi
