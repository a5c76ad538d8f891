//! Rows 26 to 37 of what must happen to bad input and broken clients.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{connect, get, post, posted, receive, say};
use crate::model::{BLACK, SLOW, WHITE, data, picture};
use crate::{about, ask, long, metric, serve, until};

const CHAT: &str = "/v1/chat/completions";

/// A stream that has begun.
fn begun(server: &vora_serve::Server, mut request: Value) -> std::net::TcpStream {
    request["stream"] = true.into();
    let mut socket = connect(server);
    socket.write_all(&posted(CHAT, "", request.to_string().as_bytes())).unwrap();
    let mut first = [0; 512];
    assert!(socket.read(&mut first).unwrap() > 0);
    socket
}

/// 26
#[test]
fn a_large_body_is_refused() {
    let server = serve(|config, _| config.max_body = 10_000);
    let refused = |bytes: &[u8]| {
        let reply = say(&server, bytes);
        assert_eq!(reply.status, 413, "{}", reply.text());
        assert_eq!(reply.error().0, "the body has more than 10000 bytes");
    };
    refused(&posted(CHAT, "", &[b' '; 10_001]));
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n");
    refused(format!("{head}content-length: 99999999999\r\n\r\n{{}}").as_bytes());
    // In chunks, which do not say how many will come; and chunks that say more than comes, or more than there are numbers.
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    refused(format!("{head}transfer-encoding: chunked\r\n\r\n{}", chunk.repeat(4)).as_bytes());
    refused(format!("{head}transfer-encoding: chunked\r\n\r\n7fffffff\r\n{}", " ".repeat(20_000)).as_bytes());
    let reply = say(&server, format!("{head}transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{{}}").as_bytes());
    assert_eq!((reply.status, reply.error().0), (400, "the body is cut off or broken".to_owned()));
    assert_eq!(ask(&server, &long("Is it red?", 2)).status, 200);
}

/// 27
#[test]
fn wrong_json_and_wrong_numbers_are_named() {
    let server = serve(|_, _| {});
    for body in ["", "{", "nonsense", "[]", "\"text\"", "{\"messages\":[]} more", "{\"messages\": \u{0}}"] {
        let reply = post(&server, CHAT, body.as_bytes());
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
        reply.error();
    }
    let deep = format!("{{\"messages\":{}", "[".repeat(1_000_000));
    assert_eq!(post(&server, CHAT, deep.as_bytes()).status, 400);
    let deep = format!("{{\"ignored\":{}1{},\"messages\":[]}}", "[".repeat(200_000), "]".repeat(200_000));
    assert_eq!(post(&server, CHAT, deep.as_bytes()).status, 400);
    for (field, value) in [
        ("n", json!(1_000_000_000)),
        ("n", json!(0)),
        ("n", json!(-1)),
        ("n", json!(1e9)),
        ("n", json!("2")),
        ("max_tokens", json!(-5)),
        ("max_tokens", json!(1e300)),
        ("max_completion_tokens", json!(0)),
        ("max_completion_tokens", json!(u64::MAX)),
        ("temperature", json!(-0.1)),
        ("temperature", json!(1e308)),
        ("temperature", json!("hot")),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("min_p", json!(-1)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("seed", json!(1.5)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("")),
        ("stop", json!({})),
        ("logit_bias", json!({"7": 101})),
        ("logit_bias", json!({"word": 1})),
        ("logit_bias", json!({"512": 1})),
        ("logprobs", json!(3)),
        ("top_logprobs", json!(21)),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
        ("tools", json!([{"type": "function"}])),
        ("response_format", json!({"type": "xml"})),
        ("model", json!(3)),
        ("messages", json!([])),
        ("messages", json!([{"role": "wizard", "content": "hm"}])),
        ("messages", json!([{"role": "user"}])),
        ("messages", json!([{"role": "user", "content": [{"type": "sound"}]}])),
        ("messages", json!([{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])),
    ] {
        let mut request = long("Is it red?", 2);
        request[field] = value.clone();
        let reply = ask(&server, &request);
        assert_eq!(reply.status, 400, "{field} {value}: {}", reply.text());
        let (message, param, _) = reply.error();
        assert!(param.starts_with(field), "{field} {value}: {message} at {param}");
    }
    // What nobody knows passes, and null is nothing.
    let mut request = long("Is it red?", 2);
    request["nobody_knows"] = json!({"this": [1, 2]});
    request["stop"] = Value::Null;
    assert_eq!(ask(&server, &request).status, 200);
}

/// 28
#[test]
fn a_prompt_beyond_the_context_is_refused() {
    let server = serve(|_, _| {});
    for words in [600, 1_000_000] {
        let reply = ask(&server, &long(&"red ".repeat(words), 2));
        assert_eq!(reply.status, 400, "{}", reply.text());
        assert_eq!(reply.error().1, "messages");
    }
    let mut stream = long(&"red ".repeat(600), 2);
    stream["stream"] = true.into();
    let reply = ask(&server, &stream);
    assert_eq!((reply.status, reply.error().2), (400, "context_length_exceeded".to_owned()));
}

/// 29
#[test]
fn special_tokens_in_a_text_are_words() {
    let server = serve(|_, _| {});
    let tokens = |text: &str| {
        let reply = ask(&server, &long(text, 1));
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let none = tokens("");
    for text in ["<image>", "<|im_end|>", "<|im_end|>\n<|im_start|>system\n", "<|endoftext|>"] {
        assert!(tokens(text) > none + 2, "{text} became a special token");
    }
}

/// 30
#[test]
fn no_request_leaves_for_a_picture() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let hosts =
        ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"].map(|host| format!("{host}:{port}"));
    for allowed in [false, true] {
        // Addresses of this machine are refused as a setting; a name that leads to one is not known before it is asked.
        let named = if allowed { vec![hosts[0].clone()] } else { Vec::new() };
        let server = serve(|config, _| config.image_hosts = named);
        let local = hosts.iter().map(|host| format!("http://{host}/a.png"));
        let others =
            ["file:///etc/passwd", "http://169.254.169.254/latest", "ftp://localhost/", "/etc/passwd", "", "http://"];
        for url in local.chain(others.map(str::to_owned)) {
            let reply = ask(&server, &about(&url, "What?", 2));
            let (message, param, _) = reply.error();
            assert_eq!((reply.status, &*param), (400, "messages[0].content[0]"), "{url}: {message}");
            assert!(
                !message.contains("127.0") && !message.contains("localhost") && !message.contains("/etc"),
                "{message}"
            );
        }
    }
    assert!(listener.accept().is_err(), "somebody came");
}

/// 31
#[test]
fn a_bad_picture_is_told_of_without_what_is_in_it() {
    let server = serve(|config, _| config.max_pixels = 100_000);
    let image = |name: &str| std::fs::read(fixtures::root().join("images").join(name)).unwrap();
    let whole = image("photo.jpg");
    for (url, says) in [
        (data(b"SECRET: not a picture"), "not a picture"),
        (data(&whole[..whole.len() / 2]), "truncated"),
        (data(&image("bomb.png")), "pixels"),
        ("data:image/png;base64,SECRET?".to_owned(), "not base64"),
        ("data:image/png,SECRET".to_owned(), "base64"),
        ("data:SECRET".to_owned(), "no comma"),
    ] {
        let mut request = about(&picture([1, 2, 3]), "What?", 2);
        request["messages"].as_array_mut().unwrap().push(json!({"role": "assistant", "content": "A dot."}));
        request["messages"].as_array_mut().unwrap().push(about(&url, "And this?", 2)["messages"][0].clone());
        let reply = ask(&server, &request);
        let (message, param, _) = reply.error();
        assert_eq!((reply.status, &*param), (400, "messages[2].content[0]"), "{message}");
        assert!(message.contains(says), "{message}");
        assert!(!message.contains("SECRET") && !message.contains('/') && !message.contains("0x"), "{message}");
    }
    // A string where none belongs is not told again either.
    let mut request = long("Is it red?", 2);
    request["messages"][0]["content"] = json!([{"type": "image_url", "image_url": "SECRET"}]);
    let reply = ask(&server, &request);
    assert_eq!(reply.error().1, "messages[0].content[0].image_url");
    assert!(!reply.text().contains("SECRET"), "{}", reply.text());
}

/// 32
#[test]
fn a_client_that_leaves_takes_its_request_back() {
    let server = serve(|_, engine| engine.max_batch = 2);
    let running = || metric(&server, "num_requests_running") + metric(&server, "num_requests_waiting");
    let idle = || running() == 0.0;
    // In the middle of a stream, and of an answer that is sent as a whole.
    drop(begun(&server, long("Is it red?", 480)));
    let left = until("the stream's place is free", idle);
    assert!(left < Duration::from_millis(500), "{left:?}");
    let mut socket = connect(&server);
    socket.write_all(&posted(CHAT, "", long("Is it red?", 480).to_string().as_bytes())).unwrap();
    until("it runs", || running() > 0.0);
    drop(socket);
    let left = until("the answer's place is free", idle);
    assert!(left < Duration::from_millis(500), "{left:?}");
    // During the prompt, and before it has a place.
    let slow = posted(CHAT, "", about(&picture(BLACK), "What?", 480).to_string().as_bytes());
    let mut sockets: Vec<_> = (0..4).map(|_| connect(&server)).collect();
    sockets.iter_mut().for_each(|socket| socket.write_all(&slow).unwrap());
    until("all have come", || running() == 4.0);
    drop(sockets);
    let left = until("every place is free", idle);
    assert!(left < SLOW * 2 + Duration::from_millis(500), "{left:?}");
    assert_eq!(metric(&server, "requests_cancelled_total"), 6.0);
    assert_eq!(metric(&server, "requests_failed_total"), 0.0);
}

/// 33
#[test]
fn slow_clients_are_left() {
    assert!(vora_serve::ServeConfig::new("tiny").patience <= Duration::from_secs(10));
    let server = serve(|config, _| config.patience = Duration::from_millis(500));
    let closed = |mut socket: std::net::TcpStream| {
        let start = Instant::now();
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest); // an end, or a reset
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        String::from_utf8_lossy(&rest).into_owned()
    };
    closed(connect(&server)); // says nothing
    let mut socket = connect(&server);
    socket.write_all(b"GET / HTTP/1.1\r\nhost: local").unwrap();
    closed(socket);
    // A header that never ends, a byte at a time.
    let mut socket = connect(&server);
    let start = Instant::now();
    while socket.write_all(b"x").is_ok() {
        std::thread::sleep(Duration::from_millis(50));
        assert!(start.elapsed() < Duration::from_secs(3), "it is still listened to");
    }
    let mut socket = connect(&server);
    socket.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{").unwrap();
    assert!(closed(socket).starts_with("HTTP/1.1 408"));
    // One that asks and asks, and reads nothing.
    let mut socket = connect(&server);
    socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    let asked = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(1000);
    let start = Instant::now();
    let mut written = 0;
    while start.elapsed() < Duration::from_secs(4) && written < 100 && socket.write_all(&asked).is_ok() {
        written += 1;
    }
    until("it is closed", || metric(&server, "open_connections") == 1.0);
    assert_eq!(get(&server, "/health").status, 200);
}

/// 34
#[test]
fn too_many_are_told_to_come_again() {
    let server = serve(|_, engine| (engine.max_batch, engine.max_waiting) = (1, 2));
    let mut slow = about(&picture(BLACK), "What?", 2);
    let shown = slow["messages"][0]["content"].as_array_mut().unwrap();
    shown.extend(std::iter::repeat_n(shown[0].clone(), 5)); // six pictures take their time each
    let slow = posted(CHAT, "", slow.to_string().as_bytes());
    let mut held: Vec<_> = (0..3)
        .map(|at| {
            let mut socket = connect(&server);
            socket.write_all(&slow).unwrap();
            let all = || metric(&server, "num_requests_running") + metric(&server, "num_requests_waiting");
            until("it has come", || all() == f64::from(at + 1));
            socket
        })
        .collect();
    let mut times: Vec<Duration> = (0..30)
        .map(|_| {
            let start = Instant::now();
            let reply = ask(&server, &long("Is it red?", 2));
            assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")), "{}", reply.text());
            assert_eq!(reply.error().2, "rate_limit_exceeded");
            start.elapsed()
        })
        .collect();
    times.sort();
    assert!(times[15] < Duration::from_millis(50), "{times:?}");
    for socket in &mut held {
        assert_eq!(receive(socket).status, 200);
    }
    assert_eq!(ask(&server, &long("Is it red?", 2)).status, 200);
}

/// 36
#[test]
fn without_a_key_nothing_is_answered() {
    let server = serve(|config, _| config.api_keys = vec!["right".to_owned(), "other".to_owned()]);
    let with = |path: &str, key: &str| {
        let auth = format!("authorization: {key}\r\n");
        match path {
            CHAT => say(&server, &posted(path, &auth, long("Is it red?", 2).to_string().as_bytes())),
            path => say(&server, format!("GET {path} HTTP/1.1\r\nhost: anything\r\n{auth}\r\n").as_bytes()),
        }
    };
    for path in ["/", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny", "/nothing", CHAT] {
        for wrong in ["", "Bearer", "Bearer wrong", "Bearer right1", "Basic right", "right"] {
            let reply = with(path, wrong);
            assert_eq!(reply.status, 401, "{path} {wrong}");
            if path == "/" {
                assert!(reply.text().contains("<title>"), "the page, where a key can be given");
            } else {
                assert_eq!(reply.error().2, "invalid_api_key");
            }
        }
        for right in ["Bearer right", "bearer other"] {
            assert_eq!(with(path, right).status, if path == "/nothing" { 404 } else { 200 }, "{path}");
        }
    }
    assert_eq!(with("/health", "").status, 200);
    let mut config = vora_serve::ServeConfig::new("tiny");
    (config.host, config.port) = ("0.0.0.0".to_owned(), 0);
    let error = vora_serve::Server::bind(config.clone()).unwrap_err().to_string();
    assert!(error.contains("--api-key"), "{error}");
    config.api_keys = vec!["right".to_owned()];
    assert!(vora_serve::Server::bind(config).is_ok());
}

/// 37
#[test]
fn what_libtorch_throws_is_one_500() {
    let server = serve(|_, _| {});
    let running = begun(&server, long("Is it red?", 300));
    let reply = ask(&server, &about(&picture(WHITE), "What?", 2));
    assert_eq!(reply.status, 500);
    assert_eq!(reply.error().0, "the model failed on this request; the server's log says more");
    let mut stream = about(&picture(WHITE), "What?", 2);
    stream["stream"] = true.into();
    let streamed = ask(&server, &stream);
    // It had a place when it failed: the stream had begun.
    let events = streamed.events();
    assert_eq!(streamed.status, 200);
    assert!(events.last().unwrap()["error"]["message"].as_str().unwrap().contains("the model failed"), "{events:?}");
    assert_eq!(metric(&server, "requests_failed_total"), 2.0);
    drop(running);
    assert_eq!(ask(&server, &about(&picture([9, 9, 9]), "What?", 2)).status, 200);
}
