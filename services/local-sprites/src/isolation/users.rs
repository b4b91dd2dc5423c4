//! Which of this machine's user ids a sandbox's users are.
//!
//! The files of the root file system and of all disks belong to one range of ids: the image's. A
//! sandbox runs in a range of its own, which no other of this server has while it is there, and its
//! mounts map the owners of files ([`crate::isolation::owners`]). Where the machine cannot do that,
//! all sandboxes run in the image's.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use crate::{isolation::holder::Holder, sync::locked};

/// The first id of the ranges: neither systemd's containers (to 0x6FFF_FFFF), `/etc/subuid`
/// (600100000 by default) nor the mapped users of SSSD and FreeIPA (2000200000) go as far.
const FIRST: u32 = 0x7739_0000;
/// How many there are. They end far below the ids that systemd names next (0x7FFE0000).
const RANGES: u32 = 2048;

/// The ranges of a server's sandboxes.
#[derive(Debug)]
pub struct UserRanges {
    image: u32,
    /// The range of each container; none where all have the image's.
    taken: Option<Mutex<BTreeMap<String, u32>>>,
}

impl UserRanges {
    /// All sandboxes run in the range of the image, whose root has this id.
    pub fn of_image(image: u32) -> Self {
        Self { image, taken: None }
    }

    /// From now on each sandbox has its own.
    pub fn separate(&mut self) {
        self.taken = Some(Mutex::default());
    }

    pub fn are_separate(&self) -> bool {
        self.taken.is_some()
    }

    /// The first id of the owners of files.
    pub fn image(&self) -> u32 {
        self.image
    }

    /// The first id of a range that is only to try whether a sandbox can have its own.
    pub fn trial(&self) -> Option<u32> {
        self.all().next()
    }

    fn all(&self) -> impl Iterator<Item = u32> {
        let firsts = (0..RANGES).map(|number| FIRST + number * Holder::UIDS);
        firsts.filter(|first| first.abs_diff(self.image) >= Holder::UIDS)
    }

    /// The first id of a container's range: the one that it has, or a free one from now on. None
    /// where all are taken.
    pub fn take(&self, container: &str) -> Option<u32> {
        let Some(taken) = &self.taken else { return Some(self.image) };
        let mut taken = locked(taken);
        if let Some(first) = taken.get(container) {
            return Some(*first);
        }
        let first = self.free(&taken)?;
        taken.insert(container.to_owned(), first);
        Some(first)
    }

    /// The range that the next container gets, if it is one of its own.
    pub fn next(&self) -> Option<u32> {
        self.free(&locked(self.taken.as_ref()?))
    }

    fn free(&self, taken: &BTreeMap<String, u32>) -> Option<u32> {
        let taken: BTreeSet<u32> = taken.values().copied().collect();
        // One that was adopted may begin anywhere: it may be that of an earlier image.
        let overlaps = |first: u32| {
            taken.range(first - (Holder::UIDS - 1)..first + Holder::UIDS).next().is_some()
        };
        self.all().skip(1).find(|first| !overlaps(*first))
    }

    /// A container of a server before this one has a range.
    pub fn keep(&self, container: String, first: u32) {
        if let Some(taken) = &self.taken {
            locked(taken).insert(container, first);
        }
    }

    /// A container has ended.
    pub fn release(&self, container: &str) {
        if let Some(taken) = &self.taken {
            locked(taken).remove(container);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn separate(image: u32) -> UserRanges {
        let mut users = UserRanges::of_image(image);
        users.separate();
        users
    }

    fn overlap(one: u32, other: u32) -> bool {
        one.abs_diff(other) < Holder::UIDS
    }

    #[test]
    fn no_two_sandboxes_have_a_range_and_what_is_released_is_given_again() {
        // An image whose users are within the ranges, and none of them at a range's start.
        let image = FIRST + 5 * Holder::UIDS + 7;
        let users = separate(image);
        let mut ranges = Vec::new();
        while let Some(first) = users.take(&ranges.len().to_string()) {
            ranges.push(first);
        }
        // Without the one to try, and the two that the image is in.
        assert_eq!(ranges.len(), RANGES as usize - 3);
        let others = |at: usize| ranges[..at].iter().chain([&image]).copied();
        for (at, first) in ranges.iter().enumerate() {
            assert!(
                !others(at).chain(users.trial()).any(|other| overlap(other, *first)),
                "{first}"
            );
        }
        assert_eq!(users.next(), None);
        users.release("7");
        assert_eq!(users.next(), ranges.get(7).copied());
        assert_eq!(users.take("one more"), ranges.get(7).copied());
        assert_eq!(users.take("too many"), None);
        assert_eq!(users.take("one more"), ranges.get(7).copied(), "it has one");
    }

    #[test]
    fn a_range_of_a_sandbox_that_outlived_its_server_is_not_given_again() {
        let users = separate(1_895_825_408);
        let first = users.take("now").unwrap();
        let users = separate(1_895_825_408);
        users.keep("before".to_owned(), first);
        assert_ne!(users.take("now"), Some(first));
        assert_eq!(users.take("before"), Some(first));
    }

    #[test]
    fn no_sandbox_gets_users_of_an_adopted_one_whose_range_begins_elsewhere() {
        let users = separate(1_895_825_408);
        let adopted = FIRST + 2 * Holder::UIDS + 7;
        users.keep("before".to_owned(), adopted);
        for name in ["one", "two"] {
            let first = users.take(name).unwrap();
            assert!(!overlap(first, adopted), "{first}");
        }
    }

    #[test]
    fn all_have_the_images_where_they_cannot_have_their_own() {
        let users = UserRanges::of_image(1_895_825_408);
        assert_eq!(
            (users.take("one"), users.take("two")),
            (Some(1_895_825_408), Some(1_895_825_408))
        );
    }
}
