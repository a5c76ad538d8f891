//! Many clients, a fifth of them hostile (row 35).

use std::io::{Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::json;
use vora_serve::Server;

use crate::client::{connect, post, posted, receive, say};
use crate::model::picture;
use crate::{about, ask, long, metric, serve, until};

const CHAT: &str = "/v1/chat/completions";

/// Resident bytes and open descriptors of this process.
fn held() -> (usize, usize) {
    let pages: usize = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    (pages * 4096, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

/// The same once all is quiet: the server's end of the last connection, that which asked whether it is, closes a moment after
/// the client's.
fn settled() -> (usize, usize) {
    let looks = (0..25).map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        held()
    });
    looks.min_by_key(|&(_, descriptors)| descriptors).unwrap()
}

/// Request number `at`; of five one is no good. Milliseconds of an answer go into `answered`.
fn one(server: &Server, at: usize, answered: &Mutex<Vec<f64>>) {
    let request = match at % 3 {
        0 => about(&picture([(at % 250) as u8, 30, 60]), "What is it?", 1 + at % 7),
        _ => long(["Is it red?", "Where is the ring?"][at % 2], 1 + at % 9),
    };
    if at % 5 != 4 {
        let (mut request, streamed) = (request, at.is_multiple_of(2));
        request["stream"] = streamed.into();
        let asked = Instant::now();
        let reply = ask(server, &request);
        match reply.status {
            200 if streamed => assert!(reply.events().iter().all(|event| event.get("error").is_none())),
            200 => assert!(reply.json()["usage"]["completion_tokens"].as_u64().unwrap() > 0),
            status => panic!("{status}: {}", reply.text()),
        }
        answered.lock().unwrap().push(1e3 * asked.elapsed().as_secs_f64());
        return;
    }
    match at / 5 % 6 {
        0 => {
            let mut socket = connect(server);
            let streamed = json!({"messages": [{"role": "user", "content": "Go on"}], "stream": true, "max_tokens": 400, "logit_bias": {"2": -100}});
            socket.write_all(&posted(CHAT, "", streamed.to_string().as_bytes())).unwrap();
            let mut some = [0; 200];
            let _ = socket.read(&mut some);
        }
        1 => drop(connect(server)),
        2 => assert_eq!(post(server, CHAT, &request.to_string().as_bytes()[1..]).status, 400),
        3 => assert_eq!(post(server, CHAT, &vec![b'['; 300_000]).status, 413),
        4 => {
            let mut socket = connect(server);
            let bytes = posted(CHAT, "", request.to_string().as_bytes());
            socket.write_all(&bytes[..bytes.len() / 2]).unwrap();
        }
        _ => {
            let garbage: Vec<u8> = (0..500usize).map(|i| ((i * at) % 251) as u8).collect();
            let mut socket = connect(server);
            let _ = socket.write_all(&garbage);
            assert_ne!(receive_or_nothing(&mut socket), Some(200));
        }
    }
}

fn receive_or_nothing(socket: &mut std::net::TcpStream) -> Option<u16> {
    let mut peeked = [0; 1];
    matches!(socket.peek(&mut peeked), Ok(1)).then(|| receive(socket).status)
}

#[allow(clippy::print_stderr, reason = "how long answers took is for whoever runs it")]
fn soak(requests: usize, clients: usize, flat: usize) {
    let server = serve(|config, engine| {
        config.max_body = 200_000;
        (engine.max_batch, engine.max_waiting) = (8, 4 * clients);
    });
    let round = |from: usize, to: usize| {
        let (next, answered) = (AtomicUsize::new(from), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        if at >= to {
                            return;
                        }
                        one(&server, at, &answered);
                    }
                });
            }
        });
        until("all is quiet", || {
            metric(&server, "open_connections") == 1.0 && metric(&server, "num_requests_running") == 0.0
        });
        answered.into_inner().unwrap()
    };
    let first = requests / 3;
    let mut times = round(0, first); // what is made once is made here
    let (memory, descriptors) = settled();
    times.extend(round(first, requests));
    let (more_memory, more_descriptors) = settled();
    assert!(more_descriptors <= descriptors, "{descriptors} descriptors became {more_descriptors}");
    assert!(more_memory <= memory + flat, "{memory} bytes became {more_memory}");

    let [ended, failed, cancelled] =
        ["ended", "failed", "cancelled"].map(|how| metric(&server, &format!("requests_{how}_total")));
    let stats = say(&server, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").text();
    let succeeded: f64 = stats
        .lines()
        .filter(|line| line.starts_with("vora:request_success_total"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert_eq!(
        (metric(&server, "num_requests_waiting"), metric(&server, "kv_cache_usage_perc"), failed),
        (0.0, 0.0, 0.0)
    );
    assert_eq!(succeeded + cancelled, ended);
    assert!(succeeded >= times.len() as f64, "{succeeded} of {}", times.len());
    times.sort_by(f64::total_cmp);
    let [half, most, nearly_all] = [50, 95, 99].map(|percent| times[(times.len() - 1) * percent / 100]);
    let answers = times.len();
    eprintln!("{answers} answers to {clients} clients: p50 {half:.1} ms, p95 {most:.1} ms, p99 {nearly_all:.1} ms");
}

/// Runs the test `name` in a process of its own: memory and descriptors are a process's, and other tests would hold some.
fn alone(name: &str, test: impl FnOnce()) {
    const ALONE: &str = "VORA_SERVE_SOAK";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let status = command.args([name, "--exact", "--include-ignored", "--nocapture"]).env(ALONE, "1").status().unwrap();
    assert!(status.success(), "{name}: {status}");
}

#[test]
fn hundreds_of_requests_leave_nothing_behind() {
    alone("soak::hundreds_of_requests_leave_nothing_behind", || soak(300, 16, 32 << 20));
}

#[test]
#[ignore = "minutes: `cargo xtask check --clients` runs it"]
fn ten_thousand_requests_leave_nothing_behind() {
    alone("soak::ten_thousand_requests_leave_nothing_behind", || soak(10_000, 64, 64 << 20));
}
