# docker build -f docker/cuda.Dockerfile -t tuckerize:cuda .
# docker run --rm --gpus all -v "$PWD:/data" tuckerize:cuda doctor
FROM python:3.11-slim
# The wheel of the package index brings its own CUDA libraries; the host needs a driver only.
RUN pip install --no-cache-dir torch==2.13.0
COPY pyproject.toml constraints.txt README.md LICENSE /opt/tuckerize/
COPY tuckerize /opt/tuckerize/tuckerize
COPY recipes /opt/tuckerize/recipes
RUN pip install --no-cache-dir --constraint /opt/tuckerize/constraints.txt '/opt/tuckerize[bench,texts]'
WORKDIR /data
ENTRYPOINT ["tuckerize"]
