#!/bin/sh
# Installs into an empty root, and builds a program the way an installed header is used.
set -eu
unset MAKEFLAGS MFLAGS
mkdir -p build/check
root=$PWD/build/check/install
rm -rf "$root"
make --no-print-directory install DESTDIR="$root" PREFIX=/usr >/dev/null
cat >build/check/installed.c <<'EOF'
#define TRANSFORMER_IMPLEMENTATION
#include <transformer.h>
int main(void) { return tfm_version() != TFM_VERSION; }
EOF
if command -v pkg-config >/dev/null 2>&1; then
    flags=$(PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_PATH=$root/usr/share/pkgconfig PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 \
        pkg-config --cflags --libs transformer)
    version=$(PKG_CONFIG_PATH=$root/usr/share/pkgconfig pkg-config --modversion transformer)
    grep -q "version $version" transformer.h || { echo "  FAIL the pkg-config file says $version"; exit 1; }
else
    flags="-I$root/usr/include -lm"
fi
# shellcheck disable=SC2086
${CC:-cc} build/check/installed.c $flags -o build/check/installed
build/check/installed
make --no-print-directory uninstall DESTDIR="$root" PREFIX=/usr >/dev/null
[ -z "$(find "$root" -type f)" ] || { echo "  FAIL uninstall left files"; exit 1; }
echo "check-install: 1 passed, 0 failed, 0 skipped"
