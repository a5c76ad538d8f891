//! A client that says what it likes, byte for byte.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;
use vora_serve::Server;

/// A response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find_map(|(found, value)| found.eq_ignore_ascii_case(name).then_some(value))
    }

    /// The error in OpenAI's shape: its message, the field it names, its code.
    #[track_caller]
    pub(crate) fn error(&self) -> (String, String, String) {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
        let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
        keys.sort_unstable(); // another crate decides in which order JSON is kept
        assert_eq!(keys, ["code", "message", "param", "type"]);
        let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        (field("message"), field("param"), field("code"))
    }

    /// The events of a stream, the last of which has to be `[DONE]`.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = self.text();
        let whole = text.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("not ended: {text}"));
        let events = whole.split_terminator("\n\n");
        events.map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

pub(crate) fn connect(server: &Server) -> TcpStream {
    let socket = TcpStream::connect(server.address()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    socket
}

/// Sends bytes and reads one response.
pub(crate) fn say(server: &Server, bytes: &[u8]) -> Reply {
    let mut socket = connect(server);
    let _ = socket.write_all(bytes); // an answer may come before all is sent
    receive(&mut socket)
}

pub(crate) fn get(server: &Server, path: &str) -> Reply {
    say(server, format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes())
}

pub(crate) fn post(server: &Server, path: &str, body: &[u8]) -> Reply {
    say(server, &posted(path, "", body))
}

/// A request as bytes; `headers` end a line each.
pub(crate) fn posted(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Reads one response.
pub(crate) fn receive(socket: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        assert!(more(socket, &mut bytes), "closed in the head: {:?}", String::from_utf8_lossy(&bytes));
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut reply = Reply { status, head, body: bytes[head_end..].to_vec() };
    if let Some(length) = reply.header("content-length").map(|length| length.parse::<usize>().unwrap()) {
        while reply.body.len() < length && more(socket, &mut reply.body) {}
        assert_eq!(reply.body.len(), length);
    } else {
        assert_eq!(reply.header("transfer-encoding"), Some("chunked"), "{}", reply.head);
        while !reply.body.ends_with(b"0\r\n\r\n") && more(socket, &mut reply.body) {}
        reply.body = unchunked(&reply.body);
    }
    reply
}

fn more(socket: &mut TcpStream, bytes: &mut Vec<u8>) -> bool {
    let mut piece = [0; 65536];
    match socket.read(&mut piece) {
        Ok(read) => {
            bytes.extend_from_slice(&piece[..read]);
            read > 0
        }
        Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
        Err(error) => panic!("{error}; so far: {}", String::from_utf8_lossy(bytes)),
    }
}

/// What is in the chunks, as far as they go. Each holds whole events.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(at) = bytes.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..at]).unwrap(), 16).unwrap();
        let chunk = &bytes[at + 2..at + 2 + size];
        assert!(chunk.is_empty() || chunk.ends_with(b"\n\n"), "half an event: {:?}", String::from_utf8_lossy(chunk));
        body.extend_from_slice(chunk);
        bytes = &bytes[at + 4 + size..];
    }
    body
}
