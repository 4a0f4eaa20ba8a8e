# The runtime and the engine builder on an NVIDIA GPU, with driver r580 or newer and the NVIDIA Container Toolkit on the
# host. Build from the repository's root:
#
#     docker build -f docker/gpu.Dockerfile -t ddpm-deploy:gpu .
#     docker run --rm --gpus all ddpm-deploy:gpu                      the doctor: what works here
#     docker run --rm --gpus all -v "$PWD":/work -v ddpm-cache:/cache ddpm-deploy:gpu \
#         ddpm-export model.fp16.onnx -o engine.plan
#
# NOT RUN: neither this image nor what it holds has been built or run on a GPU yet. See docs/gpu.md.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY ddpm_deploy /src/ddpm_deploy
RUN python3 -m venv /opt/ddpm && /opt/ddpm/bin/pip install --no-cache-dir -c /src/constraints.txt '/src[gpu]' && rm -r /src \
    && userdel --remove ubuntu && useradd --create-home --uid 1000 user && mkdir /cache && chown user /cache
ENV PATH=/opt/ddpm/bin:$PATH XDG_CACHE_HOME=/cache
VOLUME /cache
USER user
WORKDIR /work
CMD ["ddpm-deploy", "doctor"]
