// npm: @huggingface/inference
import { readFileSync } from "node:fs";
import { InferenceClient } from "@huggingface/inference";

const [url, file, token] = process.argv.slice(2);
const client = new InferenceClient(token);
const ask = (data) => client.imageToText({ data: new Blob([data]), endpointUrl: `${url}/caption` });
const { generated_text } = await ask(readFileSync(file));
console.log(JSON.stringify({ caption: generated_text }));

// its form of chat, too
const image_url = { url: `data:image/jpeg;base64,${readFileSync(file).toString("base64")}` };
const chat = { model: "dummy", messages: [{ role: "user", content: [{ type: "image_url", image_url }] }] };
const completion = await client.endpoint(`${url}/v1`).chatCompletion(chat);
console.log(JSON.stringify({ caption: completion.choices[0].message.content }));
let words = "";
for await (const chunk of client.endpoint(`${url}/v1`).chatCompletionStream(chat)) {
  words += chunk.choices[0]?.delta?.content ?? "";
}
console.log(JSON.stringify({ caption: words }));

await ask("no picture").catch((error) => {
  console.log(JSON.stringify({ refused: `${error.message} ${JSON.stringify(error.httpResponse)}` }));
});
