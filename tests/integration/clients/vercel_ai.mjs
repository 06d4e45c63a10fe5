// npm: ai @ai-sdk/openai @ai-sdk/openai-compatible
import { readFileSync } from "node:fs";
import { generateText, streamText } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [url, file, token] = process.argv.slice(2);
const settings = { baseURL: `${url}/v1`, apiKey: token, name: "captions" };
const models = [
  createOpenAICompatible(settings)("caption_ray"),
  createOpenAI(settings).chat("caption_ray"),
];
const asking = (model, image) => ({
  model,
  messages: [{ role: "user", content: [{ type: "text", text: "Describe it." }, { type: "image", image }] }],
});
for (const model of models) {
  const { text } = await generateText(asking(model, readFileSync(file)));
  console.log(JSON.stringify({ caption: text }));
  let words = "";
  for await (const part of streamText(asking(model, readFileSync(file))).textStream) words += part;
  console.log(JSON.stringify({ caption: words }));
}
await generateText(asking(models[0], Buffer.from("\xff\xd8\xff no picture", "latin1"))).catch((error) => {
  console.log(JSON.stringify({ refused: `${error.statusCode} ${error.message}` }));
});
