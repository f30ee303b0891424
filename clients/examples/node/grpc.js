// Calls a Yuan server with @grpc/grpc-js. Prints a line for each call.
import {readFileSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const {YUAN_GRPC_ADDRESS: address = '127.0.0.1:50051', YUAN_CA: ca, YUAN_GRPC_TOKEN: token} = process.env;

const folders = ['../../../protos', '..'].map((path) => fileURLToPath(new URL(path, import.meta.url)));
const definition = protoLoader.loadSync(['yuan/v1/yuan.proto', 'google/rpc/errors.proto'], {
  includeDirs: folders,
  keepCase: true,
  enums: String,
  defaults: true,
});
// The same as clients/service_config.json.
const serviceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [
      {"service": "yuan.v1.YuanService", "method": "Generate"},
      {"service": "yuan.v1.YuanService", "method": "GenerateStream"},
      {"service": "yuan.v1.YuanService", "method": "Tokenize"},
      {"service": "yuan.v1.YuanService", "method": "Detokenize"},
      {"service": "yuan.v1.YuanService", "method": "GetModel"},
      {"service": "yuan.v1.YuanService", "method": "GetLoads"},
      {"service": "yuan.v1.YuanService", "method": "ListLoras"}
    ],
    "retryPolicy": {
      "maxAttempts": 5,
      "initialBackoff": "0.25s",
      "maxBackoff": "5s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    }
  }]
}`;

const {YuanService} = grpc.loadPackageDefinition(definition).yuan.v1;
const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
const client = new YuanService(address, credentials, {'grpc.service_config': serviceConfig});
const metadata = new grpc.Metadata();
if (token) metadata.set('authorization', `Bearer ${token}`);

const request = {prompt: '世界上最高的山是什么', max_tokens: 32, temperature: 0};
const longRequest = {...request, max_tokens: 1000, ignore_eos: true};

function generate(request, seconds) {
  const deadline = Date.now() + seconds * 1000;
  return new Promise((resolve, reject) => {
    client.Generate(request, metadata, {deadline}, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

async function stream(request) {
  const call = client.GenerateStream(request, metadata, {deadline: Date.now() + 60_000});
  process.stdout.write('stream: ');
  for await (const message of call) {
    for (const choice of message.choices) process.stdout.write(choice.text);
  }
  console.log();
}

function explain(error) {
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  if (!bytes) return grpc.status[error.code]; // gRPC itself ended the call, as at a deadline
  const details = definition['google.rpc.Status'].deserialize(bytes).details.map((any) => {
    const name = any.type_url.split('/').pop();
    return {name, ...definition[name]?.deserialize(any.value)};
  });
  const {reason} = details.find(({name}) => name === 'google.rpc.ErrorInfo');
  const violations = details.flatMap((detail) => detail.field_violations ?? []);
  return [grpc.status[error.code], reason, ...violations.map(({field, description}) => `${field}: ${description}`)].join(' ');
}

async function cancel(request) {
  const call = client.GenerateStream(request, metadata);
  try {
    for await (const message of call) {
      if (message.choices.length) call.cancel();
    }
  } catch (error) {
    console.log(`cancel: ${explain(error)}`);
  }
}

console.log(`generate: ${(await generate(request, 60)).choices[0].text}`);
await stream(request);
await generate(longRequest, 0.2).catch((error) => console.log(`deadline: ${explain(error)}`));
await generate({...request, temperature: -1}, 60).catch((error) => console.log(`error: ${explain(error)}`));
await cancel(longRequest);
client.close();
