#!/bin/sh
# Makes a key and has the lab's authority sign it: sign.sh CA_CERTIFICATE CA_KEY NAME SUBJECT_ALT_NAMES
# NAME.crt appears by a rename, last.
set -eu

ca=$1 ca_key=$2 name=$3 subjects=$4

openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc \
  -subj "/CN=GLM-OCR lab registry" -addext "subjectAltName=$subjects" \
  -addext "extendedKeyUsage=serverAuth" -keyout "$name.key" -out "$name.csr"
openssl x509 -req -in "$name.csr" -CA "$ca" -CAkey "$ca_key" -days 3650 \
  -copy_extensions copy -out "$name.crt.partial"
rm "$name.csr"
mv "$name.crt.partial" "$name.crt"
