#!/bin/sh
# Installs into an empty root, with a umask that hides all, and builds a program the way an installed header is used.
set -eu
unset MAKEFLAGS MFLAGS
mkdir -p build/check
root=$PWD/build/check/install
cat >build/check/installed.c <<'EOF'
#define TRANSFORMER_IMPLEMENTATION
#include <transformer.h>
int main(void) { return tfm_version() != TFM_VERSION; }
EOF
for prefix in /usr '/opt/a folder'; do
    rm -rf "$root"
    mkdir "$root"
    (umask 077 && make --no-print-directory install DESTDIR="$root" PREFIX="$prefix" >/dev/null)
    hidden=$(find "$root" ! -type d ! -perm 644 -o -type d ! -perm -755)
    [ -z "$hidden" ] || { echo "  FAIL not for all to read: $hidden"; exit 1; }
    if command -v pkg-config >/dev/null 2>&1; then
        folder=$root$prefix/share/pkgconfig
        flags=$(PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_PATH=$folder PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 \
            pkg-config --cflags --libs transformer)
        version=$(PKG_CONFIG_PATH=$folder pkg-config --modversion transformer)
        grep -q "version $version" transformer.h || { echo "  FAIL the pkg-config file says $version"; exit 1; }
    else
        flags="-I'$root$prefix/include' -lm"
    fi
    eval "${CC:-cc} build/check/installed.c $flags -o build/check/installed" # the flags are quoted for a shell
    build/check/installed
    make --no-print-directory uninstall DESTDIR="$root" PREFIX="$prefix" >/dev/null
    [ -z "$(find "$root" -type f)" ] || { echo "  FAIL uninstall left files"; exit 1; }
done
echo "check-install: 1 passed, 0 failed, 0 skipped"
