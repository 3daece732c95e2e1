# The image contains the wheel and what it needs, and no source tree.
#   docker build -t samgraft .
#   docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" -v "$PWD:/data" samgraft pretrain --data scans/
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY configs configs
COPY finetune finetune
COPY shared shared
COPY ssl ssl
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM python:3.12-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(ls /wheels/*.whl)[dicom,s3,onnx,monai]" \
 && rm -r /wheels
# A run may belong to any user of the host, who has no home here. Caches go where everybody can write.
ENV HOME=/tmp XDG_CACHE_HOME=/tmp/cache
RUN useradd --no-create-home samgraft
USER samgraft
WORKDIR /data
ENTRYPOINT ["samgraft"]
CMD ["--help"]
