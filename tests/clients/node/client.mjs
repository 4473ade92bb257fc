// What OpenAI's client for JavaScript makes of a server: node client.mjs URL. Writes an object with an entry per matter.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What does os.path.join do?" }];
const asked = { model: "tiny", messages, max_tokens: 12, temperature: 0 };
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
const calling = { ...asked, max_tokens: 90, tools, tool_choice: "required", parallel_tool_calls: false };
const Thing = z.object({ name: z.enum(["pen", "cup"]), sizes: z.array(z.int().min(0).max(99)).max(2) });

const failure = async (work) => {
  try {
    await work();
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, param: error.param, message: error.message };
  }
  return null;
};

const matters = {
  models: async () => (await client.models.list()).data.map((model) => model.id),
  chat: async () => {
    const made = await client.chat.completions.create(asked);
    return { text: made.choices[0].message.content, reason: made.choices[0].finish_reason, usage: made.usage };
  },
  stream: async () => {
    let text = "";
    let usage = null;
    const stream = await client.chat.completions.create({
      ...asked, stream: true, stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return { text, usage };
  },
  call: async () => {
    const [call] = (await client.chat.completions.create(calling)).choices[0].message.tool_calls;
    const done = await client.chat.completions.create({
      ...asked,
      tools,
      tool_choice: "none",
      messages: [
        ...messages,
        { role: "assistant", content: null, tool_calls: [call] },
        { role: "tool", tool_call_id: call.id, content: "Sun" },
      ],
    });
    const streamed = await client.chat.completions.stream(calling).finalChatCompletion();
    return {
      name: call.function.name,
      arguments: call.function.arguments,
      streamed: streamed.choices[0].message.tool_calls.map((one) => one.function.arguments),
      after: done.choices[0].finish_reason,
    };
  },
  structured: async () => {
    const form = zodResponseFormat(Thing, "thing");
    const made = await client.chat.completions.parse({ ...asked, max_tokens: 90, response_format: form });
    return made.choices[0].message.parsed;
  },
  responses: async () => {
    const made = await client.responses.create({
      model: "tiny", input: messages[0].content, max_output_tokens: 12, temperature: 0,
    });
    let text = "";
    const stream = await client.responses.create({
      model: "tiny", input: messages[0].content, max_output_tokens: 12, temperature: 0, stream: true,
    });
    for await (const event of stream) text += event.type === "response.output_text.delta" ? event.delta : "";
    return { text: made.output_text, streamed: text };
  },
  completions: async () => {
    const made = await client.completions.create({
      model: "tiny", prompt: "import os", max_tokens: 4, temperature: 0, echo: true, logprobs: 1,
    });
    return { text: made.choices[0].text, tokens: made.choices[0].logprobs.tokens.length };
  },
  embeddings: async () =>
    (await client.embeddings.create({ model: "tiny", input: ["import os", "def"] })).data.map((one) => one.embedding),
  errors: async () => ({
    missing: await failure(() => client.chat.completions.create({ ...asked, model: "other" })),
    wrong: await failure(() => client.chat.completions.create({ ...asked, temperature: -1 })),
    late: await failure(() => client.chat.completions.create({ ...asked, max_tokens: 400 }, { timeout: 1 })),
  }),
  abort: async () => {
    const control = new AbortController();
    setTimeout(() => control.abort(), 50);
    const long = { model: "tiny", prompt: "import os", max_tokens: 490, ignore_eos: true };
    const whole = await failure(() => client.completions.create(long, { signal: control.signal }));
    const stream = await client.completions.create({ ...long, stream: true });
    let chunks = 0;
    for await (const _ of stream) if (++chunks === 3) stream.controller.abort();
    return { kind: whole?.kind, chunks };
  },
};

const found = {};
for (const [name, work] of Object.entries(matters)) {
  try {
    found[name] = await work();
  } catch (error) {
    found[name] = { failed: String(error.stack) };
  }
}
console.log(JSON.stringify(found));
