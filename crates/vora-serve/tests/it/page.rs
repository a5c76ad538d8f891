//! The page says of itself what a browser may do with it, and asks nobody else for anything.

use crate::client::get;
use crate::serve;

#[test]
fn the_page_is_one_file_that_needs_nothing_else() {
    let server = serve(|_, _| {});
    let reply = get(&server, "/");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = reply.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    let page = reply.text();
    for outside in
        ["http://", "https://", "//cdn", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"]
    {
        assert!(!page.contains(outside), "{outside}");
    }
}
