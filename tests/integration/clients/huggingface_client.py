# pip: huggingface_hub
import base64
import json
import sys

from huggingface_hub import InferenceClient

url, file, token = sys.argv[1:]
client = InferenceClient(model=f"{url}/caption", token=token)
print(json.dumps({"caption": client.image_to_text(file).generated_text}))

chat = InferenceClient(base_url=f"{url}/v1", token=token)
with open(file, "rb") as picture:
    encoded = base64.b64encode(picture.read()).decode()
content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}]
messages = [{"role": "user", "content": content}]
print(json.dumps({"caption": chat.chat_completion(messages).choices[0].message.content}))
stream = chat.chat_completion(messages, stream=True)
words = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
print(json.dumps({"caption": words}))
try:
    client.image_to_text(b"no picture")
except Exception as error:
    print(json.dumps({"refused": str(error)}))
