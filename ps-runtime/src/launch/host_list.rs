//! The first host of Slurm's compressed list, such as `gpu[003-007,9],x1`, and of a file with a host in each line.
//!
//! Ranges are never expanded: `n[0-4294967295]` costs no more than its text.

/// Returns the first host: `gpu003` for `gpu[003-007,9],x1`.
///
/// Only the first entry is checked. A name can have several brackets, as in `rack[1-2]node[03-04]`. The
/// result is never longer than the list.
pub(super) fn first_host(list: &str) -> Result<String, &'static str> {
    let mut host = String::new();
    let mut rest = list.trim().chars();
    while let Some(c) = rest.next() {
        match c {
            ',' => break,
            '[' => first_number(&mut rest, &mut host)?,
            ']' => return Err("a bracket closes that was not opened"),
            c if c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_') => host.push(c),
            _ => return Err("a host is made of letters, digits, '-', '.' and '_'"),
        }
    }
    if host.is_empty() {
        return Err("it begins with no host");
    }
    Ok(host)
}

/// Returns the host of the first line that has one: `gpu3` for `gpu3 slots=4` and `gpu3:4`, as Open MPI and MPICH write it.
pub(super) fn first_line(text: &str) -> Option<&str> {
    let mut words = text.lines().filter_map(|line| {
        let word = line.split_whitespace().next();
        word.filter(|word| !word.starts_with('#'))
    });
    let word = words.next()?;
    match word.split_once(':') {
        Some((host, rest)) if !rest.contains(':') => Some(host),
        _ => Some(word),
    }
}

/// Adds the first number of a bracket to the host, with its leading zeros, and skips the bracket.
fn first_number(
    rest: &mut impl Iterator<Item = char>,
    host: &mut String,
) -> Result<(), &'static str> {
    let before = host.len();
    let mut is_first = true;
    for c in rest {
        match c {
            ']' if host.len() == before => return Err("a bracket begins with no number"),
            ']' => return Ok(()),
            ',' | '-' => is_first = false,
            c if c.is_ascii_digit() => {
                if is_first {
                    host.push(c);
                }
            }
            _ => return Err("in brackets are only digits, '-' and ','"),
        }
    }
    Err("a bracket is not closed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(list: &str, expected: Result<&str, &str>) {
        match (first_host(list), expected) {
            (Ok(host), Ok(expected)) => assert_eq!(host, expected),
            (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
            (found, expected) => panic!("{list:?} gives {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn the_first_host_is_found() {
        check("gpu[003-007,9],x1", Ok("gpu003"));
        check("localhost", Ok("localhost"));
        check("x1,gpu[003-007]", Ok("x1"));
        check("n[7]", Ok("n7"));
        check("n[007,1-3]", Ok("n007"));
        check("rack[1-2]node[03-05],y", Ok("rack1node03"));
        check("gpu[1-2]-ib.cluster", Ok("gpu1-ib.cluster"));
        check("n[0-99999999999999999999]", Ok("n0"));
        check("a-b_c.d", Ok("a-b_c.d"));
        check(" n1 ", Ok("n1"));
        // What follows the first host does not matter.
        check("n1,[", Ok("n1"));
    }

    #[test]
    fn the_first_host_of_a_file_is_found() {
        for (text, expected) in [
            ("gpu3\ngpu4\n", Some("gpu3")),
            (
                "# two hosts\n\n  gpu3 slots=4 # and a comment\ngpu4",
                Some("gpu3"),
            ),
            ("gpu3:4\ngpu4:4\n", Some("gpu3")),
            ("fd00::1\n", Some("fd00::1")),
            ("#gpu3\n", None),
            ("", None),
        ] {
            assert_eq!(first_line(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_bad_list_says_what_is_wrong() {
        check("", Err("no host"));
        check(",n1", Err("no host"));
        check("n[", Err("not closed"));
        check("n[1-2", Err("not closed"));
        check("n[]", Err("no number"));
        check("n[-3]", Err("no number"));
        check("n]1", Err("not opened"));
        check("n[[1]]", Err("only digits"));
        check("n[a-c]", Err("only digits"));
        check("n 1", Err("a host is made of"));
    }

    /// One entry of a list: names and brackets in turn, beside the host that it begins with.
    fn entry() -> impl Strategy<Value = (String, String)> {
        let bracket = (
            "[0-9]{1,6}",
            prop::collection::vec("[0-9]{1,6}(-[0-9]{1,6})?", 0..4),
            any::<bool>(),
        );
        let piece = ("[a-z][a-z0-9.-]{0,5}", prop::option::of(bracket));
        prop::collection::vec(piece, 1..4).prop_map(|pieces| {
            let (mut text, mut host) = (String::new(), String::new());
            for (name, bracket) in pieces {
                text += &name;
                host += &name;
                if let Some((first, others, is_range)) = bracket {
                    text += &format!("[{first}");
                    text += if is_range { "-999999" } else { "" };
                    for other in others {
                        text += &format!(",{other}");
                    }
                    text += "]";
                    host += &first;
                }
            }
            (text, host)
        })
    }

    proptest! {
        #[test]
        fn any_text_gives_a_short_host_or_an_error(text: String) {
            if let Ok(host) = first_host(&text) {
                prop_assert!(!host.is_empty() && host.len() <= text.len());
            }
        }

        #[test]
        fn any_text_of_a_lists_letters_gives_a_short_host_or_an_error(text in "[a0-9\\[\\],.-]{0,30}") {
            if let Ok(host) = first_host(&text) {
                prop_assert!(!host.is_empty() && host.len() <= text.len());
                prop_assert!(!host.contains(['[', ']', ',']));
            }
        }

        #[test]
        fn the_first_host_of_a_list_is_that_of_its_first_entry(entries in prop::collection::vec(entry(), 1..4)) {
            let list = entries.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>().join(",");
            prop_assert_eq!(first_host(&list), Ok(entries[0].1.clone()));
        }
    }
}
