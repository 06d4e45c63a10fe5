// npm: openai
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [url, file, token] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: token });
const [model] = (await client.models.list()).data;
const asking = (data) => ({
  model: model.id,
  messages: [
    {
      role: "user",
      content: [
        { type: "text", text: "What is in this picture?" },
        { type: "image_url", image_url: { url: `data:image/jpeg;base64,${data.toString("base64")}`, detail: "auto" } },
      ],
    },
  ],
});
const completion = await client.chat.completions.create(asking(readFileSync(file)));
console.log(JSON.stringify({ caption: completion.choices[0].message.content }));

const stream = await client.chat.completions.create({ ...asking(readFileSync(file)), stream: true });
let words = "";
for await (const chunk of stream) words += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify({ caption: words }));

await client.chat.completions.create(asking(Buffer.from("no picture"))).catch((error) => {
  console.log(JSON.stringify({ refused: `${error.status} ${error.message}` }));
});
