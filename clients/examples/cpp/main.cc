// Calls a Yuan server, with code that protoc writes to gen/. Prints a line for each call.
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include <grpcpp/grpcpp.h>

#include "google/rpc/errors.pb.h"
#include "yuan/v1/yuan.grpc.pb.h"

namespace {

using std::chrono::milliseconds;
using yuan::v1::GenerateRequest;
using yuan::v1::GenerateResponse;
using yuan::v1::GenerateStreamResponse;
using yuan::v1::YuanService;

std::string Variable(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value ? value : fallback;
}

std::unique_ptr<YuanService::Stub> Connect() {
  grpc::SslCredentialsOptions options;
  std::ifstream ca(Variable("YUAN_CA", ""));
  options.pem_root_certs.assign(std::istreambuf_iterator<char>(ca), {});
  auto credentials = ca.is_open() ? grpc::SslCredentials(options) : grpc::InsecureChannelCredentials();
  return YuanService::NewStub(grpc::CreateChannel(Variable("YUAN_GRPC_ADDRESS", "127.0.0.1:50051"), credentials));
}

std::unique_ptr<grpc::ClientContext> NewContext(milliseconds timeout) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + timeout);
  std::string token = Variable("YUAN_GRPC_TOKEN", "");
  if (!token.empty()) context->AddMetadata("authorization", "Bearer " + token);
  return context;
}

GenerateRequest NewRequest() {
  GenerateRequest request;
  request.set_prompt("世界上最高的山是什么");
  request.set_max_tokens(32);
  request.set_temperature(0);
  return request;
}

GenerateRequest NewLongRequest() {
  GenerateRequest request = NewRequest();
  request.set_max_tokens(1000);
  request.set_ignore_eos(true);
  return request;
}

std::string Explain(const grpc::Status& status) {
  if (status.ok()) return "OK";
  std::string text = "status " + std::to_string(status.error_code());
  google::rpc::Status details;
  details.ParseFromString(status.error_details());
  for (const auto& any : details.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest bad_request;
    if (any.UnpackTo(&info)) text += " " + info.reason();
    if (!any.UnpackTo(&bad_request)) continue;
    for (const auto& one : bad_request.field_violations()) text += " " + one.field() + ": " + one.description();
  }
  return text;
}

grpc::Status Generate(YuanService::Stub& stub, const GenerateRequest& request, milliseconds timeout) {
  GenerateResponse response;
  grpc::Status status = stub.Generate(NewContext(timeout).get(), request, &response);
  if (status.ok()) std::cout << "generate: " << response.choices(0).text() << std::endl;
  return status;
}

grpc::Status Stream(YuanService::Stub& stub) {
  auto context = NewContext(std::chrono::minutes(1));
  auto call = stub.GenerateStream(context.get(), NewRequest());
  std::cout << "stream: ";
  GenerateStreamResponse message;
  while (call->Read(&message)) {
    for (const auto& choice : message.choices()) std::cout << choice.text() << std::flush;
  }
  std::cout << std::endl;
  return call->Finish();
}

grpc::Status Cancel(YuanService::Stub& stub) {
  auto context = NewContext(std::chrono::minutes(1));
  auto call = stub.GenerateStream(context.get(), NewLongRequest());
  GenerateStreamResponse message;
  while (call->Read(&message)) {
    if (message.choices_size()) context->TryCancel();
  }
  return call->Finish();
}

}  // namespace

int main() {
  auto stub = Connect();
  GenerateRequest invalid = NewRequest();
  invalid.set_temperature(-1);
  for (const auto& status : {Generate(*stub, NewRequest(), std::chrono::minutes(1)), Stream(*stub)}) {
    if (status.ok()) continue;
    std::cerr << Explain(status) << ": " << status.error_message() << std::endl;
    return 1;
  }
  std::cout << "deadline: " << Explain(Generate(*stub, NewLongRequest(), milliseconds(200))) << std::endl;
  std::cout << "error: " << Explain(Generate(*stub, invalid, std::chrono::minutes(1))) << std::endl;
  std::cout << "cancel: " << Explain(Cancel(*stub)) << std::endl;
}
