//! What a client is told when it does something wrong (PS-6, PS-7).

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use ps_actors::http::HttpConfig;
use ps_actors::server::ServerConfig;

use super::asp;
use super::client::{LEN, Settings, World, bytes, caller, stamp};

const TOKEN: &str = "a-token-of-tests-only";

fn good() -> Vec<u8> {
    bytes(&[1.0; LEN])
}

#[test]
fn what_is_wrong_with_a_request_is_said() {
    let world = World::new(Settings {
        server: ServerConfig {
            max_norm: 1000.0,
            ..asp()
        },
        ..Settings::default()
    });
    world.client().join(0, 5).expect(200);
    let check = |path: &str, headers: &str, body: &[u8], status: u16, says: &str| {
        let got = world.client().post(path, headers, body);
        assert_eq!(got.status, status, "{path} {headers}: {}", got.text());
        assert!(got.text().contains(says), "{:?}", got.text());
        let kind = got.header("content-type");
        assert!(kind.starts_with("text/plain"), "{kind}");
        got
    };
    let stamped = stamp(0, 1, 0, 0);
    for missing in [
        "worker",
        "incarnation",
        "clock",
        "version",
        "loss",
        "num-examples",
    ] {
        let missing = format!("ps-{missing}");
        let rest = stamped.split_inclusive("\r\n");
        let rest: String = rest.filter(|line| !line.starts_with(&missing)).collect();
        check("/v1/push", &rest, &good(), 400, &missing);
        let twice = format!("{stamped}{missing}: 0\r\n");
        check("/v1/push", &twice, &good(), 400, &missing);
        let text = format!("{rest}{missing}: many\r\n");
        check("/v1/push", &text, &good(), 400, "many");
    }
    let join = "ps-worker: 0\r\nps-request: 5\r\n";
    let negative = join.replace('0', "-1");
    check("/v1/join", &negative, &[], 400, "ps-worker");
    check("/v1/join", &caller(0, 1), &[], 400, "ps-request");

    let short = &good()[..36];
    check("/v1/push", &stamped, short, 422, "40 bytes, not 36");
    let long = bytes(&[1.0; LEN + 1]);
    check("/v1/push-pull", &stamped, &long, 413, "40 bytes, not 44");
    for no_length in ["", "transfer-encoding: chunked\r\n"] {
        let mut client = world.client();
        let head = format!("POST /v1/push HTTP/1.1\r\nhost: x\r\n{stamped}{no_length}\r\n");
        client.write(head.as_bytes());
        let text = client.receive().expect(411).text();
        assert!(text.contains("content-length"), "{text}");
    }

    world.client().join(0, 6).expect(200);
    for (path, headers, body, says) in [
        ("/v1/push", stamp(0, 1, 0, 0), &good()[..], "fenced off"),
        ("/v1/join", join.to_owned(), &[], "fenced off"),
        ("/v1/push", stamp(9, 1, 0, 0), &good(), "not a member"),
        ("/v1/heartbeat", caller(9, 1), &[], "not a member"),
        ("/v1/heartbeat", caller(0, 1), &[], "fenced off"),
    ] {
        let over = check(path, &headers, body, 409, says);
        assert_eq!(over.header("ps-join-again"), "1");
    }
    let far = stamp(0, 2, u64::MAX, 0);
    let far = check("/v1/push", &far, &good(), 409, "too far ahead");
    assert_eq!(far.find("ps-join-again"), None);
    let future = check("/v1/push", &stamp(0, 2, 0, 7), &good(), 409, "computed on");
    assert_eq!(future.header("ps-version"), "0");

    let mut client = world.client();
    let query = client.get("/v1/weights?version=newest").expect(400);
    assert!(query.text().contains("at-least:N"));
    client.get("/v1/nothing").expect(404);
    client.post("/v1/weights", "", &[]).expect(405);

    // Bad numbers are an answer, not an error: the worker goes on with its next step (S-6).
    for (clock, bad) in [(0, f32::NAN), (1, f32::INFINITY), (2, 1000.0)] {
        let body = bytes(&[bad; LEN]);
        let refused = client
            .post("/v1/push", &stamp(0, 2, clock, 0), &body)
            .expect(200);
        assert_eq!(refused.header("ps-outcome"), "refused-norm");
        assert_eq!(refused.header("ps-version"), "0");
    }
    client
        .post("/v1/push", &stamp(0, 2, 3, 0), &good())
        .expect(200);
    let gone = client.get("/v1/weights?version=exactly:0").expect(410);
    assert_eq!(gone.header("ps-version"), "1");
    let status = world.status();
    assert!(status.contains(r#""num_applied":1"#), "{status}");
    assert!(status.contains(r#""num_refused":3"#), "{status}");
}

#[test]
fn without_the_token_nothing_is_served() {
    let world = World::new(Settings {
        token: Some(TOKEN),
        ..Settings::default()
    });
    for path in ["/v1/status", "/v1/weights", "/v1/layout"] {
        world.client().get(path).expect(401);
        let mut client = world.client();
        client.send("GET", path, "authorization: Bearer something else\r\n", &[]);
        client.receive().expect(401);
        // Nobody tries one token after the other on one connection.
        let mut client = world.client();
        let right = format!("authorization: Bearer {TOKEN}\r\n");
        client.send("GET", path, &right, &[]);
        client.receive().expect(200);
    }
    world
        .client()
        .post("/v1/join", &caller(0, 1), &[])
        .expect(401);
}

/// A page of another site cannot train, also if it lets its name point to this address (DNS rebinding).
#[test]
fn what_a_browser_sends_for_a_page_is_refused() {
    let world = World::new(Settings {
        server: asp(),
        ..Settings::default()
    });
    world.client().join(0, 5).expect(200);
    let (me, stamped) = (caller(0, 1), stamp(0, 1, 0, 0));
    for page in [
        "origin: http://evil.example\r\n",
        "Origin: null\r\n",
        "origin: http://x\r\n",
        "sec-fetch-site: cross-site\r\n",
        "sec-fetch-site: same-origin\r\n",
    ] {
        for (method, path, headers, body) in [
            (
                "POST",
                "/v1/join",
                "ps-worker: 0\r\nps-request: 6\r\n",
                vec![],
            ),
            ("POST", "/v1/leave", me.as_str(), vec![]),
            ("POST", "/v1/heartbeat", me.as_str(), vec![]),
            ("POST", "/v1/push", stamped.as_str(), good()),
            ("POST", "/v1/push-pull", stamped.as_str(), good()),
            ("GET", "/v1/weights", "", vec![]),
            ("GET", "/v1/layout", "", vec![]),
            ("GET", "/v1/status", "", vec![]),
            ("OPTIONS", "/v1/push", "", vec![]),
        ] {
            let mut client = world.client();
            client.send(method, path, &format!("{headers}{page}"), &body);
            let got = client.receive().expect(403);
            assert!(got.text().contains("page in a browser"), "{}", got.text());
            assert_eq!(got.find("access-control-allow-origin"), None);
        }
    }
    // Nothing has happened, and the worker is still a member.
    let status = world.status();
    assert!(status.contains(r#""version":0,"#), "{status}");
    world.client().post("/v1/heartbeat", &me, &[]).expect(200);
    // Somebody who types the address into a browser may look.
    let mut client = world.client();
    client.send("GET", "/v1/status", "sec-fetch-site: none\r\n", &[]);
    client.receive().expect(200);
}

/// The start of a push whose body is to follow.
fn head() -> String {
    let stamp = stamp(0, 1, 0, 0);
    format!("POST /v1/push HTTP/1.1\r\nhost: x\r\ncontent-length: 40\r\n{stamp}\r\n")
}

#[test]
fn a_gradient_that_is_cut_off_changes_nothing() {
    let world = World::new(Settings {
        server: asp(),
        ..Settings::default()
    });
    world.client().join(0, 0).expect(200);
    let mut client = world.client();
    client.write(head().as_bytes());
    client.write(&good()[..39]);
    client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    // Whether it is still told so depends on who is quicker.
    let mut rest = Vec::new();
    let _ = client.stream.read_to_end(&mut rest);
    assert!(
        rest.is_empty() || rest.starts_with(b"HTTP/1.1 400"),
        "{rest:?}"
    );
    let status = world.status();
    assert!(status.contains(r#""next_clock":0"#), "{status}");
    let whole = world.client().post("/v1/push", &stamp(0, 1, 0, 0), &good());
    assert_eq!(whole.expect(200).header("ps-version"), "1");
}

#[test]
fn a_gradient_that_does_not_go_on_is_given_up() {
    let world = World::new(Settings {
        server: asp(),
        http: HttpConfig {
            silence: Duration::from_millis(50),
            ..HttpConfig::default()
        },
        ..Settings::default()
    });
    world.client().join(0, 0).expect(200);
    let mut client = world.client();
    // In one piece: between two, it may be silent for too long.
    client.write(&[head().as_bytes(), &good()[..20]].concat());
    let text = client.receive().expect(408).text();
    assert!(text.contains("20 of 40 bytes"), "{text}");
    assert!(client.is_at_end());
}

/// One client keeps the only place, a byte at a time; the other is told to come back, and the
/// first is not given up before its time.
#[test]
fn only_so_many_gradients_are_received_at_once() {
    let world = World::new(Settings {
        server: asp(),
        http: HttpConfig {
            max_uploads: 1,
            silence: Duration::from_secs(2),
            ..HttpConfig::default()
        },
        ..Settings::default()
    });
    world.client().join(0, 0).expect(200);
    world.client().join(1, 0).expect(200);
    let mut slow = world.client();
    let head = head().replace("host: x", "host: x\r\nexpect: 100-continue");
    slow.write(head.as_bytes());
    // That is said when somebody wants the body, so it has the place.
    let mut go_on = [0; 25];
    slow.stream.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");

    let mut other = world.client();
    other.send("POST", "/v1/push", &stamp(1, 1, 0, 0), &good());
    let mut bytes = good().into_iter();
    let a_while = Some(Duration::from_millis(200));
    other.stream.get_ref().set_read_timeout(a_while).unwrap();
    let started = Instant::now();
    loop {
        let mut first = [0; 1];
        match other.stream.get_ref().peek(&mut first) {
            Ok(_) => break,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(started.elapsed() < super::client::SOON);
        let byte = bytes.next().expect("the other is answered within 8 s");
        slow.stream.get_mut().write_all(&[byte]).unwrap();
    }
    let refused = other.receive().expect(503);
    assert_eq!(refused.header("retry-after"), "1");
    assert!(refused.text().contains("on their way"));
    slow.write(&bytes.collect::<Vec<_>>());
    assert_eq!(slow.receive().expect(200).header("ps-version"), "1");
    let again = world.client().post("/v1/push", &stamp(1, 1, 0, 0), &good());
    assert_eq!(again.expect(200).header("ps-version"), "2");
}

/// Who is no member takes no place: it is refused before its body is read.
#[test]
fn strangers_do_not_keep_members_from_sending() {
    let world = World::new(Settings {
        server: asp(),
        http: HttpConfig {
            max_uploads: 1,
            ..HttpConfig::default()
        },
        ..Settings::default()
    });
    world.client().join(1, 0).expect(200);
    let strangers: Vec<_> = (0..4)
        .map(|_| {
            let mut client = world.client();
            client.write(head().as_bytes());
            client.write(&good()[..1]);
            client
        })
        .collect();
    let pushed = world.client().post("/v1/push", &stamp(1, 1, 0, 0), &good());
    pushed.expect(200);
    for mut client in strangers {
        let text = client.receive().expect(409).text();
        assert!(text.contains("not a member"), "{text}");
    }
}

/// A body that would take longer than it may loses its place to the next one, long before its time.
#[test]
fn the_slowest_body_loses_its_place_when_others_wait() {
    let world = World::new(Settings {
        server: asp(),
        http: HttpConfig {
            max_uploads: 2,
            silence: super::client::SOON,
            max_upload_time: super::client::SOON,
        },
        ..Settings::default()
    });
    for worker in 0..3 {
        world.client().join(worker, 0).expect(200);
    }
    let begin = |worker: u32, num_bytes: usize| {
        let mut client = world.client();
        let head = head()
            .replace("host: x", "host: x\r\nexpect: 100-continue")
            .replace("ps-worker: 0", &format!("ps-worker: {worker}"));
        client.write(head.as_bytes());
        let mut go_on = [0; 25];
        client.stream.read_exact(&mut go_on).unwrap();
        client.write(&good()[..num_bytes]);
        client
    };
    // At its speed the first will be done within seconds, the other one never.
    let mut fast = begin(0, 39);
    let mut slowest = begin(1, 0);
    let pushed = world.client().post("/v1/push", &stamp(2, 1, 0, 0), &good());
    pushed.expect(200);
    let text = slowest.receive().expect(408).text();
    assert!(text.contains("others wait"), "{text}");
    fast.write(&good()[39..]);
    fast.receive().expect(200);
}
