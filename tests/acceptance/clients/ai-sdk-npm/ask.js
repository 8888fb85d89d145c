// Asks the AI SDK for objects and tool calls, at the environment's base URL: node ask.js MODEL.

import { openai } from "@ai-sdk/openai";
import { generateObject, generateText, streamObject, tool } from "ai";
import { z } from "zod";

const [name] = process.argv.slice(2);
const prompt = "A red card is gone.";
const schema = z.object({ colour: z.enum(["red", "blue"]), lost: z.boolean() });
const found = {};
// `openai(name)`, the default, uses the Responses API.
for (const [api, model] of Object.entries({ responses: openai(name), chat: openai.chat(name) })) {
  found[`${api}_object`] = (await generateObject({ model, prompt, schema, temperature: 0, maxRetries: 0 })).object;
  const streamed = streamObject({ model, prompt, schema, temperature: 0, maxRetries: 0 });
  for await (const part of streamed.partialObjectStream) found[`${api}_stream`] = part;
  const tools = { report: tool({ description: "Reports a card.", inputSchema: schema }) };
  const asked = { model, prompt, tools, toolChoice: "required", temperature: 0, maxRetries: 0 };
  found[`${api}_tool`] = (await generateText(asked)).toolCalls[0]?.input;
}
for (const card of Object.values(found)) schema.parse(card);
console.log(JSON.stringify(found));
