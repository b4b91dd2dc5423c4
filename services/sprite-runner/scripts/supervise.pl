#!/usr/bin/perl
# Runs a job once, detached, and spools what it writes: an agent's turn, or a step of the set-up.
# usage: supervise.pl DIR [JOB]        any number of times; the job starts once
#
# DIR/JOB (`job` where it is absent) has a setting a line. This program writes, beside it:
#   stdout, stderr  the spool: what the job wrote while it ran, and within `drain` seconds of its end
#   exit            how the job ended, written last and atomically: `exit N`, `timeout`, `killed` or `lost`, then `dropped=BYTES`
#   late            what processes that the job left running write after that; the first MiB of it
#   lock            held as long as this program lives        started  the job was started, in this sandbox
#
# The job writes to pipes, so that it may open /dev/stdout anew, and may not truncate the spool. This program is not of the job's user
# where the sandbox lets it become root, and the job gets no right to signal other users: `pkill`, `kill $PPID` and `kill -9 -1` miss it.
# The session's variables are in the job's environment alone.
use strict;
use warnings;
no warnings "exec";
use Fcntl qw(:flock :mode F_SETFD FD_CLOEXEC O_WRONLY O_RDWR O_CREAT O_APPEND);
use POSIX qw(:sys_wait_h :errno_h);

my $dir = shift // die "usage: supervise.pl DIR [JOB]\n";
my $job = shift // "job";
exit 0 if -e "$dir/exit";
chdir $dir or die "supervise: $dir: $!\n";
my %system_calls = (x86_64 => { prctl => 157 }, aarch64 => { prctl => 167 });
my $system_call = $system_calls{ (POSIX::uname())[4] } // {};

my %job = (argv => [], cwd => [], var => []);
open(my $settings, "<:raw", $job) or die "supervise: $job: $!\n";
while (my $line = <$settings>) {
    chomp $line;
    my ($name, $value) = split / /, $line, 2;
    if (ref $job{$name}) { push @{ $job{$name} }, $value } else { $job{$name} = $value }
}
close $settings;

# Whoever starts this waits until the job runs, or hears why it does not.
pipe(my $told, my $tell) or die "supervise: $!\n";
defined(my $daemon = fork) or die "supervise: $!\n";
if ($daemon) {
    close $tell;
    my $failure = do { local $/; <$told> };
    print STDERR $failure if $failure;
    exit($failure ? 1 : 0);
}
close $told;
POSIX::setsid();
open(STDIN, "<", "/dev/null");
open(STDOUT, ">", "/dev/null");
open(STDERR, ">&", $tell);
$0 = "aod";

sysopen(my $lock, "lock", -e "lock" ? 0 : O_RDWR | O_CREAT, 0644) or die "supervise: lock: $!\n";
flock($lock, LOCK_EX | LOCK_NB) or exit 0;
exit 0 if -e "exit";

sub read_file {
    my ($path) = @_;
    open(my $file, "<:raw", $path) or return "";
    local $/;
    return scalar(<$file>) // "";
}

# Which sandbox this is: another one after a restart.
sub sandbox {
    my ($started) = read_file("/proc/1/stat") =~ /.*\)(?: \S+){19} (\d+)/s;
    return join " ", read_file("/proc/sys/kernel/random/boot_id") =~ /(\S+)/, $started // "";
}

sub uptime { return (split / /, read_file("/proc/uptime"))[0] || time }

# What runs of the job, wherever it went: this program adopts what its children leave behind. It does not look into their environments,
# which root may not do without a right that would reach further.
sub descendants {
    my %children;
    for my $stat (glob "/proc/[0-9]*/stat") {
        my ($pid, $state, $parent) = read_file($stat) =~ /^(\d+) \(.*\) (\S) (\d+)/s or next;
        push @{ $children{$parent} }, $pid if $state ne "Z";
    }
    my @found = @{ delete $children{$$} // [] };
    for (my $next = 0; $next < @found; $next++) { push @found, @{ delete $children{ $found[$next] } // [] } }
    return @found;
}

# What an earlier supervisor's job left running.
sub marked {
    my $mark = "AOD_TURN=$job{mark}";
    return grep { $_ != $$ && ("\0" . read_file("/proc/$_/environ") . "\0") =~ /\0\Q$mark\E\0/ } map { m{^/proc/(\d+)$} } glob "/proc/[0-9]*";
}

# The status has its room on the disk from the beginning: at the end there may be none.
sub reserve {
    sysopen(my $room, "exit.draft", O_WRONLY | O_CREAT, 0644) or die "supervise: exit.draft: $!\n";
    my $written = syswrite($room, "\n" x 512);
    die "supervise: exit.draft: $!\n" unless defined $written && $written == 512;
    # Allocated now, not when the kernel comes to it.
    $room->sync;
}

sub finish {
    my ($status) = @_;
    sysopen(my $room, "exit.draft", O_WRONLY) or return;
    syswrite($room, "$status\n");
    $room->sync;
    close $room;
    rename "exit.draft", "exit";
}

sub become_root {
    POSIX::setgid(0);
    POSIX::setuid(0);
}

# Started, not ended, and nobody held the lock.
if (-e "started") {
    my $same = read_file("started") eq sandbox();
    become_root();
    my @left = marked();
    kill "KILL", @left;
    reserve() unless -e "exit.draft";
    finish($same ? "killed" : "lost");
    exit 0;
}

sub environment {
    my %env = %ENV;
    delete @env{qw(_ SHLVL PWD OLDPWD)};
    my $own = $env{PATH} || "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    my $path = $own;
    for my $pair (map({ s/ /=/r } @{ $job{var} }), split /\0/, read_file($job{env})) {
        my ($name, $value) = split /=/, $pair, 2;
        next unless defined $value;
        if ($name eq "PATH") {
            # As people write it in a shell.
            $value =~ s/\$(?:PATH\b|\{PATH\})/$path/g;
            $path = $value;
        } else {
            $env{$name} = $value;
        }
    }
    # What the Sprite has is found whatever the user's PATH is; then where pip, cargo and go put programs.
    my $home = $env{HOME} // "/";
    my @programs = ("$home/.local/bin", ($env{CARGO_HOME} || "$home/.cargo") . "/bin", $env{GOBIN} || ($env{GOPATH} || "$home/go") . "/bin");
    my %seen;
    $env{PATH} = join ":", grep { $_ ne "" && !$seen{$_}++ } split(/:/, $path), split(/:/, $own), @programs;
    $env{AOD_TURN} = $job{mark};
    return %env;
}

pipe(my $stdout, my $stdout_end) or die "supervise: $!\n";
pipe(my $stderr, my $stderr_end) or die "supervise: $!\n";
pipe(my $go, my $start) or die "supervise: $!\n";
fcntl($_, 1031, 1 << 20) for $stdout, $stderr;
# PR_SET_CHILD_SUBREAPER
syscall($system_call->{prctl}, 36, 1, 0, 0, 0) if $system_call->{prctl};
defined(my $agent = fork) or die "supervise: $!\n";
if (!$agent) {
    close $start;
    POSIX::setsid();
    # No right to signal processes of other users (CAP_KILL).
    syscall($system_call->{prctl}, 47, 3, 5, 0, 0) if $system_call->{prctl};
    my %env = environment();
    open(STDIN, "<", $job{stdin});
    open(STDOUT, ">&", $stdout_end);
    open(STDERR, ">&", $stderr_end);
    for my $place (@{ $job{cwd} }) { last if chdir $place }
    exit 0 unless sysread($go, my $byte, 1);
    %ENV = ();
    $ENV{$_} = $env{$_} for sort keys %env;
    exec { $job{argv}[0] } @{ $job{argv} };
    print STDERR "$job{argv}[0] cannot be started: $!\n";
    POSIX::_exit($! == ENOENT ? 127 : 126);
}
close $_ for $stdout_end, $stderr_end, $go;
become_root();

my @spool;
for my $stream (["stdout", $stdout], ["stderr", $stderr]) {
    my ($name, $pipe) = @$stream;
    sysopen(my $file, $name, O_WRONLY | O_CREAT | O_APPEND, 0644) or die "supervise: $name: $!\n";
    push @spool, { name => $name, pipe => $pipe, file => $file, dropped => 0, gap => 0 };
}
reserve();
# Where a sandbox tells what its network policy refused.
my $refused = "/.sprite/policy/refused";
my %refused_before = map { $_ => 1 } split /\n/, read_file($refused);
{
    open(my $started, ">", "started") or die "supervise: started: $!\n";
    print $started sandbox();
    close $started or die "supervise: started: $!\n";
}
pipe(my $woken, my $wake) or die "supervise: $!\n";
$wake->blocking(0);
$SIG{CHLD} = sub { syswrite($wake, "x") };
$SIG{PIPE} = "IGNORE";
my $begun = uptime();
syswrite($start, "x");
close $start;
close $tell;
open(STDERR, ">", "/dev/null");

# Bytes that did not go to the disk are counted, and told where they are missing.
sub spool {
    my ($spool, $data) = @_;
    if ($spool->{gap}) {
        my $note = "\n[aod] the sandbox's disk was full: $spool->{gap} bytes are missing here\n";
        my $written = write_all($spool->{file}, $note);
        if ($written < length $note) {
            # A part of a note is no output.
            $spool->{gap} += length $data;
            $spool->{dropped} += length $data;
            return;
        }
        $spool->{gap} = 0;
    }
    my $missing = length($data) - write_all($spool->{file}, $data);
    $spool->{gap} += $missing;
    $spool->{dropped} += $missing;
}

sub write_all {
    my ($file, $data) = @_;
    my $at = 0;
    while ($at < length $data) {
        my $written = syswrite($file, $data, length($data) - $at, $at);
        next if !defined $written && $! == EINTR;
        last unless $written;
        $at += $written;
    }
    return $at;
}

my $late_room = 1 << 20;

sub late {
    my (undef, $data) = @_;
    return unless $late_room > 0;
    open(my $file, ">>:raw", "late") or return;
    $late_room -= length $data;
    syswrite($file, $data);
}

# Waits at most so long for output, an end of a process or nothing, and moves what came.
sub move {
    my ($wait, $to) = @_;
    my $ready = "";
    vec($ready, fileno $woken, 1) = 1;
    for my $spool (@spool) { vec($ready, fileno $spool->{pipe}, 1) = 1 if $spool->{pipe} }
    return if select($ready, undef, undef, $wait < 0 ? 0 : $wait) <= 0;
    sysread($woken, my $ignored, 4096) if vec($ready, fileno $woken, 1);
    for my $spool (grep { $_->{pipe} && vec($ready, fileno $_->{pipe}, 1) } @spool) {
        my $count = sysread($spool->{pipe}, my $data, 65536);
        if ($count) {
            $to->($spool, $data);
        } elsif (defined $count || $! != EINTR) {
            close $spool->{pipe};
            $spool->{pipe} = undef;
        }
    }
}

my $code;

sub reap {
    while ((my $pid = waitpid(-1, WNOHANG)) > 0) {
        next if $pid != $agent;
        $code = WIFSIGNALED($?) ? 128 + WTERMSIG($?) : WEXITSTATUS($?);
    }
}

# Holds the Sprite awake.
sub stay_awake {
    return unless -S "/.sprite/api.sock";
    defined(my $pid = fork) or return;
    return if $pid;
    my @request = ("-s", "-m", "5", "--unix-socket", "/.sprite/api.sock", "-X", "PUT", "-d", '{"expire":"5m"}', "http://sprite/v1/tasks/aod");
    open(STDERR, ">", "/dev/null");
    exec { "curl" } "curl", @request;
    POSIX::_exit(127);
}

my ($now, $next_awake) = ($begun, $begun);
my $deadline = $begun + $job{timeout};
while (!defined $code && $now < $deadline) {
    if ($now >= $next_awake) {
        stay_awake();
        $next_awake = $now + 60;
    }
    my $next = $deadline < $next_awake ? $deadline : $next_awake;
    move($next - $now, \&spool);
    reap();
    $now = uptime();
}
my $status = defined $code ? "exit $code" : "timeout";
my $drained = $now + $job{drain};
if (!defined $code) {
    # What ignores TERM has its grace, then goes too.
    my $killed = $now + $job{kill_grace};
    kill "TERM", -$agent, descendants();
    while ($now < $killed && ((kill 0, -$agent) || descendants())) {
        move(0.1, \&spool);
        reap();
        $now = uptime();
    }
    kill "KILL", -$agent, descendants();
    $drained = uptime() + 0.5;
}
sub is_open { return grep { $_->{pipe} } @spool }
while (is_open() && ($now = uptime()) < $drained) {
    move($drained - $now, \&spool);
    reap();
}
my $said = join "", map { "refused by the network policy: $_\n" } grep { !$refused_before{$_} } split /\n/, read_file($refused);
if (is_open() && $status ne "timeout") {
    $said .= "[aod] processes that were left running still write to this output. What they write from now on is in $dir/late\n";
}
spool($spool[1], $said) if $said;
my $dropped = 0;
$dropped += $_->{dropped} for @spool;
$_->{file}->sync for @spool;
finish($dropped ? "$status dropped=$dropped" : $status);
# Their pipes stay open.
while (is_open()) {
    move(3600, \&late);
    reap();
}
