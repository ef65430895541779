#!/bin/sh
# Makes the secrets of infra/compose.yaml in a folder; what is there already stays. Nothing is printed but names.
#
#   infra/secrets.sh /etc/modelpress/secrets
#
# Compose mounts the files as they are: those who run in the containers (uid 10001, PostgreSQL's 999) must be able to
# read them, so they are world-readable in a folder that only its owner enters. Docker's daemon enters as root.
set -eu

folder=${1:?"usage: $0 FOLDER"}
mkdir -p "$folder"
chmod 0700 "$folder"

random() { # random NUMBER: that many hexadecimal digits
  head -c "$(($1 / 2))" /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

write() { # write NAME TEXT: complete or not at all, and never over what is there
  [ -e "$folder/$1" ] && return
  printf '%s' "$2" > "$folder/.$1.partial"
  chmod 0444 "$folder/.$1.partial"
  mv "$folder/.$1.partial" "$folder/$1"
  echo "made $folder/$1"
}

credentials() {
  printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$(random 20 | tr a-f A-F)" "$(random 40)"
}

for name in prefect_db_password mlflow_db_password mlflow_password mlflow_session_key; do
  write "$name" "$(random 48)"
done
write prefect_auth "modelpress:$(random 48)"
write s3_writer "$(credentials)"
write s3_reader "$(credentials)"
# The key that clients send, for everything; the server has its digest. More of them: modelpress access create.
if [ ! -e "$folder/serving_keys" ]; then
  write serving_key "mpk_$(random 12)_$(random 64)"
  key=$(cat "$folder/serving_key")
  digest=$(printf '%s' "$key" | sha256sum | cut -d ' ' -f 1)
  kept='{"id": "%s", "name": "compose", "scopes": ["infer", "admin", "promote", "metrics"], "sha256": "%s", '
  kept="$kept"'"created": "%s", "expires": null, "revoked": null}'
  # shellcheck disable=SC2059  # the format is ours
  entry=$(printf "$kept" "$(printf '%s' "$key" | cut -d _ -f 2)" "$digest" "$(date -u +%Y-%m-%dT%H:%M:%SZ)")
  write serving_keys "{\"format_version\": 1, \"keys\": [$entry]}"
fi
