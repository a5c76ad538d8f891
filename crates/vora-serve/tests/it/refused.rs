//! What a request may not ask for is said at its field, as OpenAI's API does.

use serde_json::{Value, json};

use crate::client::{connect, get, post, posted, receive, say};
use crate::model::assistant_with;
use crate::{ask, loading, long, metric, serve, until};

const CHAT: &str = "/v1/chat/completions";

/// Status, field, code and message of a refusal.
fn refusal(server: &vora_serve::Server, body: &[u8]) -> (u16, Option<String>, Option<String>, String) {
    let reply = post(server, CHAT, body);
    let error = &reply.json()["error"];
    let text = |key: &str| error[key].as_str().map(str::to_owned);
    (reply.status, text("param"), text("code"), text("message").unwrap())
}

#[test]
fn the_field_that_is_wrong_is_named() {
    let server = serve(|_, engine| engine.max_waiting = 3);
    let with = |key: &str, value: Value| {
        let mut request = long("hi", 2);
        request[key] = value;
        request.to_string()
    };
    let array = r#"["tiny", [["user", "hi"]], 1]"#.to_owned();
    let duplicate = r#"{"messages": [{"role": "user", "content": "hi"}], "model": "tiny", "model": "tiny"}"#.to_owned();
    let format =
        |schema: Value| with("response_format", json!({"type": "json_schema", "json_schema": {"schema": schema}}));
    let endless = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    let many: serde_json::Map<String, Value> =
        (0..1500).map(|at| (format!("p{at}"), json!({"type": "null"}))).collect();
    for (body, param, said) in [
        (array, None, "expected an object with `messages`"),
        (r#"{"messages": [["user", "hi"]]}"#.to_owned(), Some("messages[0]"), "an object with `role`"),
        (r#"{"messages":[{"role":"user""#.to_owned(), None, "the body is not JSON"),
        (r#"{"messages":[],"tools":[1,2,"#.to_owned(), None, "the body is not JSON"),
        (duplicate, Some("model"), "duplicate field `model`"),
        (with("n", json!(4)), Some("n"), "it must be 1 to 3"),
        (format(json!({"type": "colour"})), Some("response_format"), "colour"),
        (format(json!({"$ref": "#"})), Some("response_format"), "response_format: "),
        (format(endless), Some("response_format"), "response_format: "),
        (format(json!({"type": "object", "properties": many})), Some("response_format"), "response_format: "),
    ] {
        let (status, found, _, message) = refusal(&server, body.as_bytes());
        assert_eq!((status, found.as_deref()), (400, param), "{body:.200}: {message}");
        assert!(message.contains(said), "{body:.200}: {message}");
    }
    let url = json!([{"type": "image_url", "image_url": "data:image/png;base64,"}]);
    let (_, param, _, message) =
        refusal(&server, json!({"messages": [{"role": "user", "content": url}]}).to_string().as_bytes());
    assert!(param.unwrap().ends_with("image_url") && message.contains("an object with `url`"), "{message}");

    let key = "9".repeat(300_000);
    let (status, .., message) = refusal(&server, with("logit_bias", json!({key: "x"})).as_bytes());
    assert!(status == 400 && message.len() < 1000, "{} bytes", message.len());
    for words in [2_000, 200_000] {
        let (status, _, code, message) = refusal(&server, long(&"a ".repeat(words), 2).to_string().as_bytes());
        assert_eq!((status, code.as_deref()), (400, Some("context_length_exceeded")), "{message}");
    }
}

#[test]
fn a_templates_own_refusal_is_the_clients_to_mend() {
    let (server, engine) = loading(|_, _| {});
    let template = "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('System role not \
                    supported') }}{% endif %}{{ message['content'] }}{% endfor %}";
    let assistant = assistant_with(|folder| {
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    });
    server.answer_with(assistant, engine).unwrap();
    assert_eq!(ask(&server, &long("hi", 2)).status, 200);
    let body = json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]});
    let (status, param, _, message) = refusal(&server, body.to_string().as_bytes());
    assert_eq!((status, param.as_deref()), (400, Some("messages")));
    assert!(message.contains("System role not supported") && !message.contains('/'), "{message}");
}

#[test]
fn names_and_hosts_are_read_as_http_has_them() {
    let server = serve(|config, _| config.name = "a b/ü".to_owned());
    assert_eq!(get(&server, "/v1/models/a%20b%2F%C3%BC").json()["id"], "a b/ü");
    let twice = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n";
    assert_eq!(say(&server, twice).status, 400);
}

/// Row 37: requests that outlast the time to drain are told so.
#[test]
fn what_is_given_up_is_told() {
    let server = serve(|_, engine| engine.max_batch = 1);
    let request = |stream: bool| {
        let mut request = long("Go on", 450);
        request["stream"] = stream.into();
        posted(CHAT, "", request.to_string().as_bytes())
    };
    let mut streamed = connect(&server);
    std::io::Write::write_all(&mut streamed, &request(true)).unwrap();
    until("it runs", || metric(&server, "num_requests_running") == 1.0);
    let mut waiting = connect(&server);
    std::io::Write::write_all(&mut waiting, &request(false)).unwrap();
    until("it waits", || metric(&server, "num_requests_waiting") == 1.0);
    let draining = std::thread::spawn(move || (server.drain(std::time::Duration::from_millis(1)), server));
    let waiting = receive(&mut waiting);
    assert_eq!(waiting.status, 503, "{}", waiting.text());
    let last = receive(&mut streamed).events().into_iter().find(|event| event.get("error").is_some());
    assert!(last.unwrap()["error"]["message"].as_str().unwrap().contains("ending"));
    assert!(!draining.join().unwrap().0);
}
