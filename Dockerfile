# Two stages: packages are installed with a compiler at hand, the served image has one for Triton alone and runs as nobody.
#   docker build -t loraplex .                                                   CPU
#   docker build -t loraplex --build-arg BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04 \
#                --build-arg TORCH=torch==2.13.0 --build-arg TORCH_INDEX=https://pypi.org/simple .   CUDA
#   docker run --gpus all -p 8000:8000 -v loraplex:/data loraplex                    with NVIDIA's container toolkit
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN if ! command -v python3 >/dev/null || ! python3 -m venv --help >/dev/null 2>&1; then \
      apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; fi
# the CPU kernels are compiled here
RUN if ! command -v gcc >/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
RUN python3 -m venv /opt/loraplex
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY server server
COPY kernels kernels
COPY adapters adapters
RUN /opt/loraplex/bin/pip install --no-cache-dir "${TORCH}" --index-url "${TORCH_INDEX}" \
 && /opt/loraplex/bin/pip install --no-cache-dir . --constraint constraints.txt

FROM ${BASE}
# libgomp1: torch and bitsandbytes share one OpenMP
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
 && if ! command -v python3 >/dev/null; then apt-get install -y --no-install-recommends python3; fi \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 loraplex \
 && install -d -o loraplex /data
COPY --from=build /opt/loraplex /opt/loraplex
# Triton compiles what launches its kernels when it runs
RUN if ls -d /opt/loraplex/lib/python3*/site-packages/triton >/dev/null 2>&1; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
        $(command -v python3-config >/dev/null || echo python3-dev) && rm -rf /var/lib/apt/lists/*; fi
COPY --chown=loraplex demo/base /demo/base
COPY --chown=loraplex demo/adapters /demo/adapters
USER loraplex
ENV PATH=/opt/loraplex/bin:$PATH XDG_DATA_HOME=/data XDG_CACHE_HOME=/data/cache TRITON_CACHE_DIR=/data/cache/triton \
    LORAPLEX_HOST=0.0.0.0
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["loraplex"]
CMD ["serve", "/demo/base", "--served-model-name", "base"]
