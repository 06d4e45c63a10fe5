# pip: openai
import base64
import json
import sys

import openai

url, file, token = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=token)


def ask(data: bytes, **more: object) -> object:
    picture = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="caption_ray", messages=messages, **more)


with open(file, "rb") as picture:
    data = picture.read()
print(json.dumps({"caption": ask(data).choices[0].message.content}))
parts = [chunk.choices[0].delta.content or "" for chunk in ask(data, stream=True)]
print(json.dumps({"caption": "".join(parts)}))
try:
    ask(b"no picture")
except openai.APIStatusError as error:
    print(json.dumps({"refused": str(error)}))
