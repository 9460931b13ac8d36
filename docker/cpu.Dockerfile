# docker build -f docker/cpu.Dockerfile -t tuckerize .
# docker run --rm -v "$PWD:/data" tuckerize inspect /data/MODEL
FROM python:3.11-slim
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml constraints.txt README.md LICENSE /opt/tuckerize/
COPY tuckerize /opt/tuckerize/tuckerize
COPY recipes /opt/tuckerize/recipes
RUN pip install --no-cache-dir --constraint /opt/tuckerize/constraints.txt '/opt/tuckerize[bench,texts]'
WORKDIR /data
ENTRYPOINT ["tuckerize"]
