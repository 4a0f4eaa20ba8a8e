# The runtime on a CPU: no PyTorch, no compiler, no root. Build from the repository's root:
#
#     docker build -f docker/cpu.Dockerfile -t ddpm-deploy:cpu .
#     docker run --rm -v "$PWD":/work ddpm-deploy:cpu ddpm-run model.onnx -o samples.png
#
# Its steps were run by hand in an empty environment of Python 3.11; the image itself has not been built.
FROM python:3.11-slim

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY ddpm_deploy /src/ddpm_deploy
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[cpu]' && rm -r /src \
    && useradd --create-home user
USER user
WORKDIR /work
CMD ["ddpm-deploy", "doctor"]
