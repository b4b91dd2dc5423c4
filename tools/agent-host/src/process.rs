//! Processes of the sandbox's user: how they are started, and how whole trees of them are ended.
//!
//! A program is started through `agent-host exec`, which becomes the user in a process of its own
//! and then the program: changing users between `fork` and `exec` cannot be done in safe Rust.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use contract::host::Spec;
use rustix::{
    fs::{Gid, MemfdFlags, Mode, OFlags, Uid, fchown, memfd_create},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid},
    thread::{
        CapabilitySet, CapabilitySets, capability_is_in_ambient_set,
        configure_capability_in_ambient_set, set_capabilities, set_keep_capabilities,
    },
};

use crate::adapters::{Launch, Stdio as LaunchStdio};

/// In the environment of every process that works on turns.
pub const MARK: &str = "AOD_HOST_SESSION";
/// In place of a program: the adapter's actions, in this process. The user need not be able to
/// start the host's file.
const PREPARE: &str = "--prepare";
const PIPE_BYTES: usize = 1 << 20;
/// In place of a program: ends what is marked with the session, which only its own user can see.
const END_MARKED: &str = "--end-marked";
/// This program, whatever became of its file.
pub const SELF: &str = "/proc/self/exe";
/// An argument that is longer is passed as a file.
pub const ARGUMENT_BYTES_MAX: usize = 100_000;

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
    /// The host has to become this user.
    pub other: bool,
}

impl User {
    /// Looks a user up by name or number; the host's own where no name is given.
    pub fn find(name: &str) -> Result<Self, String> {
        let own = rustix::process::getuid().as_raw();
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        let user = Self::parse(&passwd, &group, name, own).or_else(|| Self::number(name, own));
        let user = match user {
            Some(user) => user,
            None if name.is_empty() => {
                let home = crate::variable("HOME").unwrap_or_else(|| "/".to_owned());
                let gid = rustix::process::getgid().as_raw();
                Self {
                    name: String::new(),
                    uid: own,
                    gid,
                    groups: Vec::new(),
                    home,
                    shell: "/bin/sh".to_owned(),
                    other: false,
                }
            }
            None => return Err(format!("user {name} does not exist")),
        };
        if user.other && own != 0 {
            return Err(format!(
                "only root can run programs as {name}: start the host as root, or without a user"
            ));
        }
        Ok(user)
    }

    /// A user that only its number names.
    fn number(name: &str, own: u32) -> Option<Self> {
        let uid = name.parse().ok()?;
        let (home, shell) = ("/".to_owned(), "/bin/sh".to_owned());
        Some(Self {
            name: name.to_owned(),
            uid,
            gid: uid,
            groups: vec![uid],
            home,
            shell,
            other: uid != own,
        })
    }

    fn parse(passwd: &str, group: &str, name: &str, own: u32) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let &[login, _, uid, gid, _, home, shell] = fields.as_slice() else { return None };
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            if !(login == name || fields.get(2) == Some(&name) || (name.is_empty() && uid == own)) {
                return None;
            }
            let member = |line: &str| {
                let fields: Vec<&str> = line.split(':').collect();
                let &[_, _, gid, members] = fields.as_slice() else { return None };
                members.split(',').any(|member| member == login).then(|| gid.parse().ok()).flatten()
            };
            let mut groups: Vec<u32> = group.lines().filter_map(member).collect();
            groups.push(gid);
            let (name, home, shell) = (login.to_owned(), home.to_owned(), shell.to_owned());
            Some(Self { name, uid, gid, groups, home, shell, other: uid != own })
        })
    }
}

/// A program that runs, and the host's ends of its input and output.
#[derive(Debug)]
pub struct Program {
    pub pid: Pid,
    pub exited: OwnedFd,
    /// Both directions of a protocol, or the reading end of a pipe.
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub has_stdin: bool,
}

/// The environment of the user's programs: the host's own, then the session's; later entries win.
fn environment(spec: &Spec, user: &User, launch: &Launch) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = vec![
        ("HOME".to_owned(), user.home.clone()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
        ("SHELL".to_owned(), user.shell.clone()),
    ];
    env.retain(|(_, value)| !value.is_empty());
    env.extend(launch.env.iter().cloned());
    env.extend(spec.env.iter().map(|variable| (variable.name.clone(), variable.value.clone())));
    // A name with `=` or a NUL cannot be passed on at all.
    env.retain(|(name, value)| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    });
    let home = env
        .iter()
        .rev()
        .find(|(name, _)| name == "HOME")
        .map_or(user.home.clone(), |(_, home)| home.clone());
    let own = crate::variable("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".to_owned());
    let given = env.iter().filter(|(name, _)| name == "PATH");
    let path = given.fold(own.clone(), |path, (_, given)| expand_path(given, &path));
    let appended = spec.append_path.iter().map(|folder| match folder.strip_prefix("~/") {
        Some(rest) => format!("{home}/{rest}"),
        None => folder.clone(),
    });
    // What the sandbox has is found whatever the user's PATH is.
    let mut folders: Vec<String> = Vec::new();
    for folder in path.split(':').chain(own.split(':')).map(str::to_owned).chain(appended) {
        if !folder.is_empty() && !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    env.push(("PATH".to_owned(), folders.join(":")));
    if launch.belongs_to_turns {
        env.push((MARK.to_owned(), spec.session_id.clone()));
    }
    env
}

/// A `PATH` as people write it in a shell.
fn expand_path(given: &str, path: &str) -> String {
    let mut expanded = String::new();
    let mut rest = given;
    while let Some(at) = rest.find('$') {
        let (before, reference) = rest.split_at(at);
        expanded.push_str(before);
        let plain = reference
            .strip_prefix("$PATH")
            .filter(|after| !after.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_'));
        match reference.strip_prefix("${PATH}").or(plain) {
            Some(after) => {
                expanded.push_str(path);
                rest = after;
            }
            None => {
                expanded.push('$');
                rest = reference.get(1..).unwrap_or_default();
            }
        }
    }
    expanded + rest
}

/// Where programs work: the first of the session's folders that exists, else the user's home.
pub fn folder(spec: &Spec, user: &User) -> String {
    let found = spec.working_directories.iter().find(|folder| Path::new(folder).is_dir()).cloned();
    let home = spec
        .env
        .iter()
        .rev()
        .find(|variable| variable.name == "HOME")
        .map(|variable| variable.value.clone());
    found.or(home).unwrap_or_else(|| user.home.clone())
}

/// Starts a program as the user, in a session and process group of its own. It dies with the host's
/// main thread.
pub fn start(spec: &Spec, user: &User, folder: &str, launch: &Launch) -> io::Result<Program> {
    let own_end = |fd: OwnedFd| -> io::Result<OwnedFd> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(fd)
    };
    let pair = || socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // Not fatal: an unprivileged user's pipes may be small.
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
        if user.other {
            // Who opens `/dev/stdout` opens the pipe by its owner and mode.
            fchown(&write, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
        }
        Ok((read, write))
    };
    let mut command = Command::new(SELF);
    command.arg("exec").arg(exec_user(user)).arg(folder);
    // They live until the program is started.
    let mut files = Vec::new();
    for (argument, is_file) in launch
        .argv
        .iter()
        .map(|argument| (argument, false))
        .chain(launch.script.iter().map(|text| (text, true)))
    {
        if !is_file && argument.len() <= ARGUMENT_BYTES_MAX {
            command.arg(argument);
            continue;
        }
        let file = File::from(memfd_create("script", MemfdFlags::empty())?);
        io::Write::write_all(&mut &file, argument.as_bytes())?;
        command.arg(format!("/proc/self/fd/{}", file.as_raw_fd()));
        files.push(file);
    }
    command.envs(environment(spec, user, launch));
    let (stdout, stderr, has_stdin) = match launch.stdio {
        LaunchStdio::Protocol => {
            let (ours, theirs) = pair()?;
            let (our_errors, their_errors) = pair()?;
            command.stdin(theirs.try_clone()?).stdout(theirs).stderr(their_errors);
            (ours, our_errors, true)
        }
        LaunchStdio::Output => {
            let (out, their_out) = pipe()?;
            let (errors, their_errors) = pipe()?;
            command.stdin(Stdio::null()).stdout(their_out).stderr(their_errors);
            (out, errors, false)
        }
    };
    let child = command.spawn()?;
    drop(files);
    let pid = Pid::from_child(&child);
    let exited = exit_of(pid)?;
    Ok(Program { pid, exited, stdout: own_end(stdout)?, stderr: own_end(stderr)?, has_stdin })
}

/// A descriptor that is ready once a child has ended.
fn exit_of(pid: Pid) -> io::Result<OwnedFd> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        // gVisor has no such call.
        Err(rustix::io::Errno::NOSYS) => exit_by_thread(pid),
        opened => Ok(opened?),
    }
}

fn exit_by_thread(pid: Pid) -> io::Result<OwnedFd> {
    let (exited, open) = pipe_with(PipeFlags::CLOEXEC)?;
    std::thread::Builder::new().name("exit".to_owned()).spawn(move || {
        // It stays for the one that asks how it ended.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while matches!(waitid(WaitId::Pid(pid), options), Err(rustix::io::Errno::INTR)) {}
        drop(open);
    })?;
    Ok(exited)
}

/// Carries out an adapter's actions as the user, in a process of its own that reads them from
/// standard input.
pub fn prepare(spec: &Spec, user: &User, launch: &Launch) -> io::Result<()> {
    if launch.prepare.is_empty() {
        return Ok(());
    }
    let mut command = Command::new(SELF);
    command.arg("exec").arg(exec_user(user)).arg("").arg(PREPARE);
    command
        .envs(environment(spec, user, launch))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        io::Write::write_all(&mut stdin, crate::prepare::to_json(&launch.prepare).as_bytes())?;
    }
    let status = child.wait()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("the preparation failed: {status}")))
    }
}

fn exec_user(user: &User) -> String {
    let groups: Vec<String> = user.groups.iter().map(u32::to_string).collect();
    if user.other {
        format!("{}:{}:{}", user.uid, user.gid, groups.join(","))
    } else {
        String::new()
    }
}

/// `agent-host exec USER FOLDER PROGRAM ARGUMENT...`: becomes the user, then the program.
pub fn exec(arguments: &[String]) -> ExitCode {
    let [user, folder, program, rest @ ..] = arguments else { return ExitCode::from(2) };
    let error = match become_user(user) {
        Err(error) => io::Error::from(error),
        Ok(()) if program == PREPARE => return crate::prepare::run(),
        Ok(()) if program == END_MARKED => {
            rest.iter().for_each(|session| kill_marked(session));
            return ExitCode::SUCCESS;
        }
        Ok(()) => {
            let home = crate::variable("HOME").unwrap_or_else(|| "/".to_owned());
            let entered = [folder.as_str(), home.as_str(), "/"]
                .iter()
                .any(|folder| std::env::set_current_dir(folder).is_ok());
            if entered {
                Command::new(program).args(rest).exec()
            } else {
                io::Error::other("no folder to work in")
            }
        }
    };
    eprintln!("{program} could not be started: {error}");
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
}

fn become_user(user: &str) -> rustix::io::Result<()> {
    let _ = rustix::process::setsid();
    // The host's own does not pass on.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    if !user.is_empty() {
        let mut fields = user.split(':');
        let mut number = || {
            fields
                .next()
                .and_then(|field| field.parse::<u32>().ok())
                .ok_or(rustix::io::Errno::INVAL)
        };
        let (uid, gid) = (number()?, number()?);
        let groups: Vec<Gid> = fields
            .next()
            .unwrap_or_default()
            .split(',')
            .filter_map(|group| Some(Gid::from_raw(group.parse().ok()?)))
            .collect();
        rustix::thread::set_thread_groups(&groups)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        // What the sandbox's user may beside its own: all but to signal other users' processes, the
        // host among them.
        let kept = ambient() - CapabilitySet::KILL;
        if !kept.is_empty() {
            set_keep_capabilities(true)?;
        }
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        if !kept.is_empty() {
            set_capabilities(
                None,
                CapabilitySets { effective: kept, permitted: kept, inheritable: kept },
            )?;
            kept.iter()
                .try_for_each(|capability| configure_capability_in_ambient_set(capability, true))?;
        }
    }
    // After the user: a change of user clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
}

/// Rights that the sandbox gives its user's processes.
fn ambient() -> CapabilitySet {
    let all = CapabilitySet::from_bits_truncate((1 << 41) - 1);
    all.iter()
        .filter(|capability| capability_is_in_ambient_set(*capability).unwrap_or(false))
        .collect()
}

/// Becomes root, by right or by `sudo`; stays what it is where neither works. Returns whom it was,
/// where it became root.
pub fn become_root(command: &[String]) -> String {
    let uid = rustix::process::getuid();
    if uid.is_root() {
        return String::new();
    }
    let (root, group) = (Uid::ROOT, Gid::ROOT);
    if rustix::thread::set_thread_res_gid(group, group, group).is_ok()
        && rustix::thread::set_thread_res_uid(root, root, root).is_ok()
    {
        let _ = rustix::thread::set_thread_groups(&[]);
        return uid.as_raw().to_string();
    }
    let quiet = || {
        Command::new("sudo")
            .args(["-n", "true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
    };
    if let (Ok(program), true) =
        (std::env::current_exe(), quiet().is_ok_and(|status| status.success()))
    {
        let path = format!("PATH={}", crate::variable("PATH").unwrap_or_default());
        let mut sudo = Command::new("sudo");
        // It keeps no PATH of its caller's.
        sudo.args(["-n", "-E", "env"])
            .arg(path)
            .arg(program)
            .args(["root-of", &uid.as_raw().to_string()])
            .args(command);
        let _ = sudo.exec();
    }
    String::new()
}

/// The parent of each process.
fn parents() -> Vec<(Pid, Pid)> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            // `pid (name) state parent ...`, where the name may hold anything.
            let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
            let after = stat.iter().rposition(|byte| *byte == b')')?;
            let mut fields =
                std::str::from_utf8(stat.get(after + 1..)?).ok()?.split_ascii_whitespace();
            let state = fields.next()?;
            let parent = fields.next()?.parse().ok()?;
            (state != "Z").then(|| Some((Pid::from_raw(pid)?, Pid::from_raw(parent)?))).flatten()
        })
        .collect()
}

/// All processes below one, except those below `spare`.
pub fn descendants(root: Pid, spare: &[Pid]) -> Vec<Pid> {
    let parents = parents();
    let mut found: Vec<Pid> = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        let children = parents
            .iter()
            .filter(|(pid, of)| *of == parent && !spare.contains(pid) && !found.contains(pid));
        let children: Vec<Pid> = children.map(|(pid, _)| *pid).collect();
        found.extend(children);
        next += 1;
    }
    found.retain(|pid| *pid != root);
    found
}

/// Whether the environment a process was started with has the session's mark.
fn is_marked(pid: Pid, session: &str) -> bool {
    let mark = format!("{MARK}={session}");
    let environment =
        fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
}

/// Processes of the session's turns that no longer descend from this host: a former host's.
fn marked(session: &str) -> Vec<Pid> {
    let own = rustix::process::getpid();
    parents()
        .into_iter()
        .map(|(pid, _)| pid)
        .filter(|pid| *pid != own && is_marked(*pid, session))
        .collect()
}

/// Ends what a former host's turns left behind.
pub fn end_marked(user: &User, session: &str) {
    if user.other {
        // Only its own user may look into a process's environment.
        let mut command = Command::new(SELF);
        command.arg("exec").arg(exec_user(user)).arg("").args([END_MARKED, session]);
        let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
    kill_marked(session);
}

fn kill_marked(session: &str) {
    for _ in 0..200 {
        let pids = marked(session);
        if pids.is_empty() {
            return;
        }
        signal(&pids, Signal::KILL);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

pub fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _ = kill_process(*pid, signal);
    }
}

/// Reaps every child that has exited; the status of each as a shell reports it.
pub fn reap() -> Vec<(Pid, i32)> {
    let mut exited = Vec::new();
    while let Ok(Some((pid, status))) = rustix::process::wait(rustix::process::WaitOptions::NOHANG)
    {
        let code =
            status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
        exited.extend(code.map(|code| (pid, code)));
    }
    exited
}

/// Tells one run of the sandbox from the next: after a restart the former host cannot have been
/// killed by anyone.
pub fn sandbox_run() -> String {
    let first = fs::read_to_string("/proc/1/stat").unwrap_or_default();
    let started = first
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_ascii_whitespace().nth(19))
        .unwrap_or_default()
        .to_owned();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {started} {}\n", boot.trim(), namespace.display())
}

/// Reads what a file holds beyond an offset.
pub fn read_from(path: &Path, offset: u64) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(mut file) = File::open(path)
        && io::Seek::seek(&mut file, io::SeekFrom::Start(offset)).is_ok()
    {
        let _ = file.take(64 << 10).read_to_end(&mut text);
    }
    text
}

/// As [`read_from`], of a file that a user wrote: nothing where it is another's, or no file. The
/// user could lay links to what only the host may read.
pub fn read_own(path: &Path, uid: u32, offset: u64) -> Vec<u8> {
    let mut text = Vec::new();
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) else { return text };
    let mut file = File::from(file);
    let is_own = file
        .metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.uid() == uid && metadata.nlink() == 1);
    if is_own && io::Seek::seek(&mut file, io::SeekFrom::Start(offset)).is_ok() {
        let _ = file.take(64 << 10).read_to_end(&mut text);
    }
    text
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags};

    use super::*;

    #[test]
    fn only_a_users_own_file_is_read_for_that_user() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let uid = rustix::process::getuid().as_raw();
        fs::write(at("file"), "one\ntwo\n").unwrap();
        assert_eq!(read_own(&at("file"), uid, 4), b"two\n");
        assert_eq!(read_own(&at("file"), uid + 1, 0), b"");
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        fs::hard_link(at("file"), at("other")).unwrap();
        for name in ["link", "other", "missing", "."] {
            assert_eq!(read_own(&at(name), uid, 0), b"", "{name}");
        }
    }

    /// As in gVisor, which has no descriptors of processes.
    #[test]
    fn the_end_of_a_program_is_noticed_without_a_descriptor_of_it() {
        let mut child = Command::new("sleep").arg("0.2").spawn().unwrap();
        let exited = exit_by_thread(Pid::from_child(&child)).unwrap();
        let within = |milliseconds: i64| {
            let limit = rustix::event::Timespec {
                tv_sec: milliseconds / 1000,
                tv_nsec: milliseconds % 1000 * 1_000_000,
            };
            let waited = PollFd::new(&exited, PollFlags::IN);
            rustix::event::poll(&mut [waited], Some(&limit)).unwrap()
        };
        assert_eq!(within(20), 0, "it runs");
        assert_eq!(within(10_000), 1);
        assert!(child.wait().unwrap().success(), "how it ended is still there");
    }

    #[test]
    fn a_path_may_refer_to_the_one_before_it() {
        for (given, expanded) in [
            ("/x:$PATH", "/x:/bin"),
            ("${PATH}:/x", "/bin:/x"),
            ("/x:$PATHS:$", "/x:$PATHS:$"),
            ("$PATH", "/bin"),
            ("/\u{e9}$HOME", "/\u{e9}$HOME"),
        ] {
            assert_eq!(expand_path(given, "/bin"), expanded);
        }
    }

    #[test]
    fn a_user_has_the_groups_that_name_it() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nsprite:x:1000:1001::/home/sprite:/bin/zsh\n";
        let group = "sudo:x:27:a,sprite\ndocker:x:99:b\nsprite:x:1001:\n";
        let user = User::parse(passwd, group, "sprite", 0).unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups, user.home.as_str()),
            (1000, 1001, vec![27, 1001], "/home/sprite")
        );
        assert!(user.other);
        assert_eq!(User::parse(passwd, group, "1000", 0).unwrap().name, "sprite");
        assert_eq!(User::parse(passwd, group, "", 0).unwrap().name, "root");
        assert_eq!(User::parse(passwd, group, "none", 0), None);
    }
}
