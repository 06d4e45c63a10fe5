// npm: @langchain/openai
import { readFileSync } from "node:fs";
import { ChatOpenAI } from "@langchain/openai";

const [url, file, token] = process.argv.slice(2);
const model = new ChatOpenAI({ model: "caption_ray", apiKey: token, configuration: { baseURL: `${url}/v1` } });
const asking = (data) => [
  {
    role: "user",
    content: [
      { type: "text", text: "Describe it." },
      { type: "image_url", image_url: { url: `data:image/jpeg;base64,${data.toString("base64")}` } },
    ],
  },
];
console.log(JSON.stringify({ caption: (await model.invoke(asking(readFileSync(file)))).content }));
let words = "";
for await (const chunk of await model.stream(asking(readFileSync(file)))) words += chunk.content;
console.log(JSON.stringify({ caption: words }));
await model.invoke(asking(Buffer.from("no picture"))).catch((error) => {
  console.log(JSON.stringify({ refused: `${error.status} ${error.message}` }));
});
