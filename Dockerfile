# The command in a container, on the CPU:
#   docker build -t hmn-replay .
#   docker run --rm -v "$PWD:/work" hmn-replay condense --data digits --budget 4KiB --out digits.hmn
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir '/src[hub,timm]'
RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
ENTRYPOINT ["hmn-replay"]
