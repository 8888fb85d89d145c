// Uploads, fine-tunes and chats with the tuned model by npm's openai: node drive.js MODEL FILE.

import { createReadStream } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI from "openai";

const [model, file] = process.argv.slice(2);
if (model === undefined || file === undefined) throw new Error("usage: node drive.js MODEL FILE");

const client = new OpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY
const base = await client.models.retrieve(model);
const listed = [];
for await (const one of client.models.list()) listed.push(one.id);
const upload = await client.files.create({ file: createReadStream(file), purpose: "fine-tune" });
let job = await client.fineTuning.jobs.create({
  model,
  training_file: upload.id,
  suffix: "npm",
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: 8 } } },
});
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await sleep(500);
  job = await client.fineTuning.jobs.retrieve(job.id);
}
const events = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id)) events.push(event.message);
if (job.fine_tuned_model === null) throw new Error(`${job.status}: ${events.join("\n")}`);
const checkpoints = await client.fineTuning.jobs.checkpoints.list(job.id);
const reply = await client.chat.completions.create({
  model: job.fine_tuned_model,
  messages: [{ role: "user", content: "Question 99 about my cash" }],
  temperature: 0,
  max_completion_tokens: 8,
});
const stream = await client.chat.completions.create({
  model: job.fine_tuned_model,
  messages: [{ role: "user", content: "Question 99 about my cash" }],
  temperature: 0,
  max_completion_tokens: 8,
  stream: true,
});
let streamed = "";
for await (const chunk of stream) streamed += chunk.choices[0]?.delta.content ?? "";
const answer = reply.choices[0]?.message.content ?? null;
if (streamed !== answer) throw new Error(`streamed ${streamed}, answered ${answer}`);
console.log(
  JSON.stringify({
    asked: [base.id, job.model, listed.includes(model) ? model : null],
    model: job.fine_tuned_model,
    checkpoint: checkpoints.data[0]?.fine_tuned_model_checkpoint,
    answer,
  }),
);
