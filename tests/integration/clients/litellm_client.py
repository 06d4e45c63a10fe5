# pip: litellm
import base64
import json
import sys

import litellm

url, file, token = sys.argv[1:]


def ask(data: bytes, **more: object) -> object:
    picture = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}]
    return litellm.completion(
        model="openai/caption_ray", api_base=f"{url}/v1", api_key=token,
        messages=[{"role": "user", "content": content}], num_retries=0, **more,
    )  # fmt: skip


with open(file, "rb") as picture:
    data = picture.read()
print(json.dumps({"caption": ask(data).choices[0].message.content}))
parts = [chunk.choices[0].delta.content or "" for chunk in ask(data, stream=True)]
print(json.dumps({"caption": "".join(parts)}))
try:
    ask(b"no picture")
except Exception as error:
    print(json.dumps({"refused": str(error)}))
