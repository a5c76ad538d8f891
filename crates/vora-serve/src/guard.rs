//! Who may ask: keys, and pages of other sites that a browser carries to a server on its own machine.

use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, ORIGIN};
use hyper::{StatusCode, Uri};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::error::ApiError;

/// The digests of the keys that open a server.
#[derive(Debug, Clone)]
pub(crate) struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// White space around a key, as files with other line ends leave it, is none of it: HTTP takes it from what is sent, too.
    pub(crate) fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| digest(key.trim().as_bytes())).collect())
    }

    /// Compares in a time that says nothing about the keys.
    ///
    /// # Errors
    /// 401.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let sent = headers.get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
        let is_bearer = sent.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
        let sent = digest(if is_bearer { sent[7..].trim_ascii() } else { b"" });
        let found = self.0.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(&sent));
        if self.0.is_empty() || bool::from(found) { Ok(()) } else { Err(ApiError::unauthorized()) }
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Refuses what a page of another site asks through a browser, and, where `here` (no key is asked for and the server listens
/// on this machine alone), names that lead here by somebody else's DNS.
///
/// # Errors
/// 403; 400 where it is said twice who is asked.
pub(crate) fn check_site(headers: &HeaderMap, uri: &Uri, here: bool) -> Result<(), ApiError> {
    if headers.get_all(HOST).iter().nth(1).is_some() {
        return Err(ApiError::refused(StatusCode::BAD_REQUEST, "there are two headers Host, one may be")); // RFC 9112, 3.2
    }
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let asked = uri.authority().map(|authority| authority.as_str()).or(text(HOST)).unwrap_or_default();
    if here && !is_this_machine(host_of(asked)) {
        let message = "the header Host is none of this machine's: ask 127.0.0.1 or localhost, or start with an API key";
        return Err(ApiError::refused(StatusCode::FORBIDDEN, message));
    }
    let other_site = text(ORIGIN).is_some_and(|origin| !is_same(origin, asked))
        || text(HeaderName::from_static("sec-fetch-site")).is_some_and(|site| site == "cross-site");
    if other_site {
        return Err(ApiError::refused(StatusCode::FORBIDDEN, "pages of other sites are not answered"));
    }
    Ok(())
}

/// `host:port` without the port.
fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

fn is_this_machine(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let is_loopback = host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || name == "localhost" || name.ends_with(".localhost")
}

/// Whether an origin is that of the host that was asked; `null` is nobody's.
fn is_same(origin: &str, asked: &str) -> bool {
    let (bare, port) = match origin.split_once("://") {
        Some(("http", rest)) => (rest, ":80"),
        Some(("https", rest)) => (rest, ":443"),
        _ => return false,
    };
    bare.trim_end_matches(port).eq_ignore_ascii_case(asked.trim_end_matches(port))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let header = |&(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(header).collect()
    }

    #[test]
    fn one_of_the_keys_opens() {
        let keys = Keys::new(&["one".to_owned(), "two\r\n".to_owned()]);
        let opens = |value: &str| keys.check(&headers(&[("authorization", value)])).is_ok();
        assert!(opens("Bearer one") && opens("bearer two"));
        assert!(
            !opens("Bearer three") && !opens("one") && !opens("Basic one") && !opens("Bearer ") && !opens("Bearer")
        );
        assert!(keys.check(&HeaderMap::new()).is_err());
        assert!(Keys::new(&[]).check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn other_names_and_other_sites_are_refused() {
        let allowed =
            |pairs: &[(&'static str, &str)]| check_site(&headers(pairs), &Uri::from_static("/"), true).is_ok();
        for host in ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "a.localhost:1", "127.1.2.3"] {
            assert!(allowed(&[("host", host)]), "{host}");
        }
        for host in ["evil.example", "evil.example:8000", "10.0.0.1:8000", "", "localhost.evil.example", "[::2]"] {
            assert!(!allowed(&[("host", host)]), "{host}");
        }
        let from = |origin| allowed(&[("host", "localhost:8000"), ("origin", origin)]);
        assert!(from("http://localhost:8000"));
        for origin in ["http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:8000", "file://"] {
            assert!(!from(origin), "{origin}");
        }
        assert!(allowed(&[("host", "localhost"), ("origin", "http://localhost:80")]));
        assert!(!allowed(&[("host", "localhost"), ("sec-fetch-site", "cross-site")]));
        // A server that asks for keys may have any name; pages of others stay out.
        let known = |pairs: &[(&'static str, &str)]| check_site(&headers(pairs), &Uri::from_static("/"), false).is_ok();
        assert!(known(&[("host", "chat.example"), ("origin", "https://chat.example")]));
        assert!(!known(&[("host", "chat.example"), ("origin", "https://evil.example")]));
    }
}
