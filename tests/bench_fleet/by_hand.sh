#!/usr/bin/env bash
# What a deployment that changes nothing checks, as an operator would type it without this project.
#
# usage: by_hand.sh EXPECTED RESULTS HOST...
#
# EXPECTED is a folder of what was written down when the hosts were deployed: `values`, variables for bash (see below),
# `files.sha256` of what is installed and `weights.sha256` of the model, as sha256sum prints them. RESULTS gets each
# host's smoke result. Two SSH executions a host, JOBS hosts at a time (20), over one connection a host where SSH_CONFIG says so.
# Every finding is printed; exit status 1 when there is one.
set -euo pipefail

# On the host, with the variables of `values`; returns 1 when there is a finding.
look() {
  local host=$1 now=$2 findings=0
  finding() { echo "$host: $*" && findings=$((findings + 1)); }

  exec 9>"$lock"
  flock --nonblock 9 || finding "somebody else works on it: $lock is taken"

  # The machine.
  local skew=$(($(date +%s) - now))
  ((${skew#-} <= 30)) || finding "its clock is $skew s off"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' || finding "no Python 3.8 at $python"
  [ -d "$systemd_dir" ] || finding "systemd does not run"
  (($(systemctl --version | awk 'NR == 1 { print $2 }') >= 243)) || finding "systemd is older than 243"
  (($(df --block-size=1M --output=avail "$state_dir" | tail -n 1) >= 1024)) || finding "less than 1 GiB free at $state_dir"
  (($(awk '/^MemTotal:/ { print $2 }' /proc/meminfo) >= 1048576)) || finding "less memory than /dev/shm is to have"
  docker info --format '{{.ServerVersion}}' >/dev/null || finding "docker does not answer"

  # The NPUs and their driver.
  local path
  for path in "${devices[@]}"; do [ -c "$path" ] || finding "no device $path"; done
  for path in "${driver_paths[@]}"; do [ -e "$path" ] || finding "no $path of the driver"; done
  grep --quiet --extended-regexp '^Version=25\.[0235]' "$version_info" || finding "another driver than 25.x: $version_info"
  local npus
  npus=$(npu-smi info) || finding "npu-smi does not answer"
  [ "$(grep --count --extended-regexp '^\| [0-9]+ +[0-9A-Za-z]+ +\| OK ' <<<"$npus")" = "$npus_wanted" ] ||
    finding "not $npus_wanted healthy NPUs"
  [ "$(grep --count '^| No running processes found' <<<"$npus")" = "$npus_wanted" ] || finding "an NPU is in use"
  awk -F '[|/]' '/:[0-9A-F][0-9A-F]\.[0-9] / { n = split($(NF - 2), used, " "); if (used[n] > 0.15 * $(NF - 1)) exit 1 }' \
    <<<"$npus" || finding "an NPU's memory is taken"

  # What is installed: image, unit, environment, tools; and what runs.
  [ "$(docker image inspect --format '{{.Id}} {{.Architecture}}' "$image" 2>&1)" = "$image_id $architecture" ] ||
    finding "$image is not $image_id"
  sha256sum --check --strict --quiet - <<<"$files" 2>&1 | sed "s/^/$host: /"
  [ "${PIPESTATUS[0]}" = 0 ] || finding "files differ"
  [ "$(stat --format %a "$unit_file" "$environment_file" 2>&1 | xargs)" = '644 640' ] || finding "modes of unit and environment differ"
  [ "$(systemctl show --property=ActiveState,UnitFileState,NeedDaemonReload "$service" | sort | xargs)" = \
    'ActiveState=active NeedDaemonReload=no UnitFileState=enabled' ] || finding "$service is not active, enabled and as on disk"
  local container pid started
  container=$(docker container inspect --format \
    '{{.State.Running}} {{.Image}} {{index .Config.Labels "glm-ocr.release"}} {{.State.Pid}} {{.State.StartedAt}}' "$service" 2>&1) || true
  read -r _ _ _ pid started <<<"$container"
  [[ $container == "true $image_id $release "* ]] || finding "the container is not $image_id of release $release: $container"
  for path in "$unit_file" "$environment_file"; do
    (($(stat --format %Y "$path") <= $(date --date "$started" +%s))) || finding "the container is older than $path"
  done

  # The port is the container's: whoever holds it descends from its first process.
  local holder
  for holder in $(ss --no-header --listening --tcp --numeric --processes "sport = :$port" | grep --only-matching 'pid=[0-9]*' | cut -c 5- | sort -u); do
    while ((holder > 1 && holder != pid)); do holder=$(awk '/^PPid:/ { print $2 }' "/proc/$holder/status"); done
    ((holder == pid)) || finding "port $port is held by another"
  done

  # The weights: read again only when a file's size, times or inode are not those of the last time. So with the driver's.
  local seen
  seen=$(find -H "${driver_paths[@]}" "${devices[@]}" "$weights_dir" -printf '%p %m %U:%G' \( -type f -printf ' %s %T@ %C@ %i\n' -o -printf '\n' \))
  if [ "$seen" != "$(cat "$memory" 2>/dev/null)" ]; then
    if (cd "$weights_dir" && sha256sum --check --strict --quiet - <<<"$weights"); then
      echo "$seen" >"$memory"
    else
      finding "the weights differ"
    fi
  fi

  # It generates, and it reads pictures whose text is known.
  curl --silent --show-error --fail --max-time 120 --header 'Content-Type: application/json' \
    --data "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"OK\"}], \"max_tokens\": 1, \"temperature\": 0}" \
    "$url/v1/chat/completions" | grep --quiet '"completion_tokens":1' || finding "it does not generate"
  mkdir -p "$state_dir/reports/by_hand"
  docker run --rm --network=host --env=PYTHONDONTWRITEBYTECODE=1 --volume="$scripts_dir:/scripts:ro" \
    --volume="$state_dir/reports/by_hand:/reports" --entrypoint=python3 "$image_id" \
    /scripts/smoke.py --base-url="$url" "${smoke_options[@]}" --output=/reports/ocr_smoke.json >/dev/null || finding "it does not read"

  ((findings == 0))
}

# On the controller: one host, and what it read.
one() {
  local host=$1 expected=$2 results=$3 findings=0
  source "$expected/values"
  { cat "$expected/values" && echo "files='$(<"$expected/files.sha256")'" && echo "weights='$(<"$expected/weights.sha256")'" &&
    declare -f look && echo "look $host $(date +%s) </dev/null"; } |
    ssh ${SSH_CONFIG:+-F "$SSH_CONFIG"} "$host" bash -s || findings=1
  ssh ${SSH_CONFIG:+-F "$SSH_CONFIG"} "$host" cat "$state_dir/reports/by_hand/ocr_smoke.json" >"$results/$host.json" </dev/null || findings=1
  grep --quiet '^  "verdict": "PASS"' "$results/$host.json" || { echo "$host: its result does not say PASS" && findings=1; }
  return "$findings"
}

expected=$1 results=$2
shift 2
export -f look one
printf '%s\n' "$@" | xargs -P "${JOBS:-20}" -I HOST bash -c 'one "$@"' one HOST "$expected" "$results" || exit 1
