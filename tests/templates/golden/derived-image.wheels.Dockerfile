# Rendered by Ansible from templates/derived-image.Dockerfile.j2: edit the inventory, not this file.
# Base sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb. For every builder since Docker 18.09, hence no BuildKit syntax.
FROM quay.io/ascend/vllm-ascend:v0.18.0rc1
COPY requirements.txt *.whl /opt/glm-ocr-derived/
# Without dependencies: the rest of the image stays what its publisher tested. What does not fit together is recorded.
RUN cd /opt/glm-ocr-derived \
 && printf '%s\n' \
    'ba59926159d2aa256eb8739b8da7e2b574b960e1202c6d624cbe981cef996c91  transformers-5.3.0-py3-none-any.whl' \
    | sha256sum --check --strict - \
 && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-deps --no-cache-dir --disable-pip-version-check \
    --no-index --find-links . --requirement requirements.txt \
 && rm -f ./*.whl \
 && { python3 -m pip check > pip-check.txt 2>&1 || true; }
LABEL glm-ocr.base-name="quay.io/ascend/vllm-ascend:v0.18.0rc1" \
      glm-ocr.base-id="sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb" \
      glm-ocr.requirements="transformers==5.3.0 huggingface-hub==1.7.2"
