//! Who is answered, and when.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::client::{connect, get, posted, receive, say};
use crate::{ask, loading, long, metric, model, serve, until};

#[test]
fn other_names_and_other_sites_are_refused() {
    let server = serve(|_, _| {});
    let status = |headers: &str| say(&server, format!("GET /v1/models HTTP/1.1\r\n{headers}\r\n").as_bytes()).status;
    assert_eq!(status("host: 127.0.0.1:8000\r\n"), 200);
    assert_eq!(status("host: rebound.example\r\n"), 403);
    assert_eq!(status("host: localhost\r\norigin: http://evil.example\r\n"), 403);
    assert_eq!(status("host: localhost\r\norigin: http://localhost\r\nsec-fetch-site: same-origin\r\n"), 200);
    assert_eq!(status("host: localhost\r\nsec-fetch-site: cross-site\r\n"), 403);
    // A form of another site can send no JSON that is taken for JSON.
    let form = posted("/v1/chat/completions", "", b"{}");
    let form = String::from_utf8(form).unwrap().replace("application/json", "text/plain");
    assert_eq!(say(&server, form.as_bytes()).status, 415);
}

#[test]
fn it_listens_before_the_model_is_there() {
    let (server, engine) = loading(|_, _| {});
    let health = get(&server, "/health");
    assert_eq!((health.status, health.json()["status"].as_str()), (503, Some("loading")));
    assert_eq!(ask(&server, &long("Is it red?", 2)).status, 503);
    assert_eq!(get(&server, "/metrics").status, 200);
    server.answer_with(model::assistant(), engine).unwrap();
    assert_eq!(get(&server, "/health").status, 200);
    assert_eq!(ask(&server, &long("Is it red?", 2)).status, 200);
}

#[test]
fn a_server_that_ends_answers_what_it_took() {
    let server = serve(|_, _| {});
    let mut socket = connect(&server);
    socket.write_all(&posted("/v1/chat/completions", "", long("Is it red?", 450).to_string().as_bytes())).unwrap();
    until("it runs", || metric(&server, "num_requests_running") == 1.0);
    std::thread::scope(|scope| {
        let drained = scope.spawn(|| server.drain(Duration::from_secs(30)));
        until("it ends", || get(&server, "/health").json()["status"] == "ending");
        let late = ask(&server, &long("Is it red?", 2));
        assert_eq!((late.status, late.header("retry-after")), (503, Some("1")));
        assert_eq!(receive(&mut socket).json()["usage"]["completion_tokens"], 450);
        assert!(drained.join().unwrap());
    });
}

#[test]
fn a_server_that_has_to_end_gives_up_what_runs() {
    let server = serve(|_, _| {});
    let mut socket = connect(&server);
    socket.write_all(&posted("/v1/chat/completions", "", long("Is it red?", 480).to_string().as_bytes())).unwrap();
    until("it runs", || metric(&server, "num_requests_running") == 1.0);
    let start = Instant::now();
    assert!(!server.drain(Duration::ZERO));
    drop(server);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

/// Connections whose clients say nothing hold nobody up: the one that has waited longest goes.
#[test]
fn idle_connections_make_room() {
    let server = serve(|config, _| config.max_connections = 8);
    let is_closed = |socket: &mut TcpStream| {
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        match socket.read(&mut [0; 16]) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    };
    // One that is answered keeps its place, and so does one whose answer is on its way.
    let mut stream = long("Is it red?", 450);
    stream["stream"] = true.into();
    let mut running = connect(&server);
    running.write_all(&posted("/v1/chat/completions", "", stream.to_string().as_bytes())).unwrap();
    until("it runs", || metric(&server, "num_requests_running") == 1.0);
    let mut idle: Vec<TcpStream> = (0..40).map(|_| connect(&server)).collect();
    let cut = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    idle.extend((0..10).map(|_| {
        let mut socket = connect(&server);
        socket.write_all(cut).unwrap(); // a body that does not come
        socket
    }));
    let start = Instant::now();
    for _ in 0..5 {
        assert_eq!(get(&server, "/health").status, 200);
        assert_eq!(ask(&server, &long("Is it red?", 2)).status, 200);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(idle.iter_mut().take(20).all(is_closed), "the first are gone");
    assert!(metric(&server, "open_connections") <= 8.0);
    assert!(receive(&mut running).events().len() >= 450);
    // One that asked before may ask again for as long as there is room.
    drop(idle);
    let mut kept = connect(&server);
    for _ in 0..3 {
        kept.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        assert_eq!(receive(&mut kept).status, 200);
    }
}

/// Where every connection has a request to be answered, the next one waits for the first that ends.
#[test]
fn a_connection_waits_for_those_that_work() {
    let server = serve(|config, _| config.max_connections = 2);
    let mut running: Vec<TcpStream> = (0..2)
        .map(|at| {
            let mut socket = connect(&server);
            let request = long("Is it red?", 100 + 300 * at);
            socket
                .write_all(&posted("/v1/chat/completions", "connection: close\r\n", request.to_string().as_bytes()))
                .unwrap();
            socket
        })
        .collect();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(get(&server, "/health").status, 200);
    for socket in &mut running {
        assert_eq!(receive(socket).status, 200);
    }
}

#[test]
fn addresses_and_methods() {
    let server = serve(|_, _| {});
    assert_eq!(get(&server, "/nothing").status, 404);
    assert_eq!(get(&server, "/v1/models/nobody").error().2, "model_not_found");
    assert_eq!(get(&server, "/v1/models/tiny%3Abase").json()["id"], "tiny:base");
    let reply = get(&server, "/v1/chat/completions");
    assert_eq!((reply.status, reply.header("allow")), (405, Some("POST")));
    assert_eq!(get(&server, "/openapi.json").json()["openapi"], "3.1.0");
}
