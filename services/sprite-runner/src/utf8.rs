//! Where bytes may be cut so that no UTF-8 character is split.

/// How many bytes at the end may be the beginning of a character that is not complete yet. Invalid
/// bytes are not waited for.
pub fn incomplete_tail(bytes: &[u8]) -> usize {
    for length in 1..=bytes.len().min(3) {
        let Some(tail) = bytes.len().checked_sub(length).and_then(|start| bytes.get(start..))
        else {
            return 0;
        };
        let Some(first) = tail.first() else { return 0 };
        if first & 0b1100_0000 == 0b1000_0000 {
            continue;
        }
        // A leading byte: incomplete when what follows it is valid so far and more is due.
        return match std::str::from_utf8(tail) {
            Err(error) if error.error_len().is_none() => length,
            _ => 0,
        };
    }
    0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_a_character_that_may_still_come_is_held_back() {
        assert_eq!(incomplete_tail("é".as_bytes()), 0);
        assert_eq!(incomplete_tail(&"é".as_bytes()[..1]), 1);
        assert_eq!(incomplete_tail(&"a😀".as_bytes()[..4]), 3);
        assert_eq!(incomplete_tail(b"\xff"), 0);
        assert_eq!(incomplete_tail(b"\x80\x80"), 0);
        assert_eq!(incomplete_tail(b"\xe2\x28"), 0);
        assert_eq!(incomplete_tail(b""), 0);
    }

    proptest! {
        #[test]
        fn cutting_there_never_changes_what_is_read(bytes: Vec<u8>, cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let (mut text, mut carry, mut at) = (String::new(), Vec::new(), 0);
            for cut in cuts {
                carry.extend_from_slice(&bytes[at..cut]);
                at = cut;
                let keep = if cut == bytes.len() { 0 } else { incomplete_tail(&carry) };
                let rest = carry.split_off(carry.len() - keep);
                text.push_str(&String::from_utf8_lossy(&carry));
                carry = rest;
            }
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
