# pip: langchain-openai
import base64
import json
import sys

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

url, file, token = sys.argv[1:]
model = ChatOpenAI(model="caption_ray", base_url=f"{url}/v1", api_key=token)


def asking(data: bytes) -> list[HumanMessage]:
    picture = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return [
        HumanMessage(
            [
                {"type": "text", "text": "Describe it."},
                {"type": "image_url", "image_url": {"url": picture}},
            ]
        )
    ]


with open(file, "rb") as picture:
    data = picture.read()
print(json.dumps({"caption": model.invoke(asking(data)).content}))
print(json.dumps({"caption": "".join(str(c.content) for c in model.stream(asking(data)))}))
image = {"type": "image", "base64": base64.b64encode(data).decode(), "mime_type": "image/jpeg"}
print(json.dumps({"caption": model.invoke([HumanMessage([image])]).content}))  # its newer form
try:
    model.invoke(asking(b"no picture"))
except Exception as error:
    print(json.dumps({"refused": str(error)}))
