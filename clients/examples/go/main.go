// Calls a Yuan server, with code that `buf generate` writes to gen/. Prints a line for each call.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	yuanv1 "example.com/yuan-example/gen/yuan/v1"
)

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
}`

func connect() (*grpc.ClientConn, error) {
	address := os.Getenv("YUAN_GRPC_ADDRESS")
	if address == "" {
		address = "127.0.0.1:50051"
	}
	option := grpc.WithInsecure()
	if ca := os.Getenv("YUAN_CA"); ca != "" {
		tls, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return nil, err
		}
		option = grpc.WithTransportCredentials(tls)
	}
	return grpc.Dial(address, option, grpc.WithDefaultServiceConfig(serviceConfig))
}

func newRequest() *yuanv1.GenerateRequest {
	return &yuanv1.GenerateRequest{
		Input:       &yuanv1.GenerateRequest_Prompt{Prompt: "世界上最高的山是什么"},
		MaxTokens:   proto.Int32(32),
		Temperature: proto.Float64(0),
	}
}

func newLongRequest() *yuanv1.GenerateRequest {
	request := newRequest()
	request.MaxTokens = proto.Int32(1000)
	request.IgnoreEos = true
	return request
}

func generate(ctx context.Context, client yuanv1.YuanServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	response, err := client.Generate(ctx, newRequest())
	if err != nil {
		return err
	}
	fmt.Printf("generate: %s\n", response.Choices[0].Text)
	return nil
}

func stream(ctx context.Context, client yuanv1.YuanServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	call, err := client.GenerateStream(ctx, newRequest())
	if err != nil {
		return err
	}
	fmt.Print("stream: ")
	for {
		message, err := call.Recv()
		if errors.Is(err, io.EOF) {
			fmt.Println()
			return nil
		}
		if err != nil {
			return err
		}
		for _, choice := range message.Choices {
			fmt.Print(choice.Text)
		}
	}
}

func deadline(ctx context.Context, client yuanv1.YuanServiceClient) {
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err := client.Generate(ctx, newLongRequest())
	fmt.Println("deadline:", explain(err))
}

func invalid(ctx context.Context, client yuanv1.YuanServiceClient) {
	request := newRequest()
	request.Temperature = proto.Float64(-1)
	_, err := client.Generate(ctx, request)
	fmt.Println("error:", explain(err))
}

func explain(err error) string {
	parts := []string{status.Code(err).String()}
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			parts = append(parts, detail.Reason)
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				parts = append(parts, violation.Field+": "+violation.Description)
			}
		}
	}
	return strings.Join(parts, " ")
}

func cancelStream(ctx context.Context, client yuanv1.YuanServiceClient) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	call, err := client.GenerateStream(ctx, newLongRequest())
	for err == nil {
		var message *yuanv1.GenerateStreamResponse
		if message, err = call.Recv(); len(message.GetChoices()) > 0 {
			cancel()
		}
	}
	fmt.Println("cancel:", explain(err))
}

func main() {
	connection, err := connect()
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := yuanv1.NewYuanServiceClient(connection)
	ctx := context.Background()
	if token := os.Getenv("YUAN_GRPC_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	if err := generate(ctx, client); err != nil {
		log.Fatal(err)
	}
	if err := stream(ctx, client); err != nil {
		log.Fatal(err)
	}
	deadline(ctx, client)
	invalid(ctx, client)
	cancelStream(ctx, client)
}
