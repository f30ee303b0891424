// Calls a Yuan server with @connectrpc/connect-node, and code that `buf generate` writes to gen/. Prints a line for each
// call.
import {readFileSync} from 'node:fs';
import {Code, ConnectError, createClient} from '@connectrpc/connect';
import {createGrpcTransport} from '@connectrpc/connect-node';
import {BadRequestSchema, ErrorInfoSchema} from './gen/google/rpc/errors_pb.js';
import {YuanService} from './gen/yuan/v1/yuan_pb.js';

const {YUAN_GRPC_ADDRESS: address = '127.0.0.1:50051', YUAN_CA: ca, YUAN_GRPC_TOKEN: token} = process.env;

const transport = createGrpcTransport({
  baseUrl: `${ca ? 'https' : 'http'}://${address}`,
  nodeOptions: ca ? {ca: readFileSync(ca)} : {},
});
const client = createClient(YuanService, transport);
const headers = token ? {authorization: `Bearer ${token}`} : {};

const request = {input: {case: 'prompt', value: '世界上最高的山是什么'}, maxTokens: 32, temperature: 0};
const longRequest = {...request, maxTokens: 1000, ignoreEos: true};

async function stream(request) {
  process.stdout.write('stream: ');
  for await (const message of client.generateStream(request, {headers, timeoutMs: 60_000})) {
    for (const choice of message.choices) process.stdout.write(choice.text);
  }
  console.log();
}

function explain(thrown) {
  const error = ConnectError.from(thrown);
  const reasons = error.findDetails(ErrorInfoSchema).map(({reason}) => reason);
  const violations = error.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations);
  return [Code[error.code], ...reasons, ...violations.map(({field, description}) => `${field}: ${description}`)].join(' ');
}

async function cancel(request) {
  const controller = new AbortController();
  try {
    for await (const message of client.generateStream(request, {headers, signal: controller.signal})) {
      if (message.choices.length) controller.abort();
    }
  } catch (error) {
    console.log(`cancel: ${explain(error)}`);
  }
}

const response = await client.generate(request, {headers, timeoutMs: 60_000});
console.log(`generate: ${response.choices[0].text}`);
await stream(request);
await client.generate(longRequest, {headers, timeoutMs: 200}).catch((error) => console.log(`deadline: ${explain(error)}`));
await client.generate({...request, temperature: -1}, {headers}).catch((error) => console.log(`error: ${explain(error)}`));
await cancel(longRequest);
