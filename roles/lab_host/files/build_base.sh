#!/bin/sh
# Builds the base root file system of the lab's nodes with debootstrap.
#
# usage: build_base.sh TARGET SUITE MIRROR PACKAGES DEB_CACHE
#
# TARGET appears by a rename when it is complete, so a run that was killed leaves nothing that
# looks finished. The lock is held by every child: a rerun waits for what an ended run left behind.
set -eu

target=$1 suite=$2 mirror=$3 packages=$4 deb_cache=$5
partial=$target.partial
here=$(dirname "$(readlink -f "$0")")

mkdir -p "$(dirname "$target")" "$deb_cache"
exec 9>"$target.lock"
flock --timeout 900 9
if [ -d "$target" ]; then
  exit 0
fi
rm -rf --one-file-system "$partial"

if ! debootstrap --variant=minbase --cache-dir="$deb_cache" --include="$packages" \
  "$suite" "$partial" "$mirror" >"$target.log" 2>&1; then
  tail -n 30 "$target.log" "$partial/debootstrap/debootstrap.log" >&2 || true
  exit 1
fi

# Nodes differ in these, and get their own.
rm -f "$partial"/etc/ssh/ssh_host_* "$partial/etc/hostname" "$partial/etc/resolv.conf"
rm -f "$partial/var/lib/dbus/machine-id"
: >"$partial/etc/machine-id"
: >"$partial/etc/resolv.conf"

cp "$here/containers.conf" "$partial/etc/containers/containers.conf"
cp "$here/sshd_lab.conf" "$partial/etc/ssh/sshd_config.d/lab.conf"
# A journal that outlives a reboot, as real machines have.
mkdir -p "$partial/var/log/journal"

# Each node enables what it is for; nothing here can reach a package mirror.
systemctl --quiet --root="$partial" disable \
  docker.service docker.socket containerd.service docker-registry.service \
  podman.service podman.socket podman-auto-update.timer podman-restart.service \
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer

rm -rf "$partial"/var/cache/apt/archives/*.deb "$partial"/var/lib/apt/lists/* \
  "$partial"/usr/share/doc/* "$partial"/usr/share/man/* "$partial"/usr/share/locale/*
date --utc +%FT%TZ >"$partial/etc/glm-ocr-lab-base"
mv "$partial" "$target"
